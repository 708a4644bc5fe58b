"""The tables of `docs/departures.md`, from the comments of the recipes: what is not published, and what `nano` changes.

In `paper.yaml` a quantity that is not published carries `# N: why this value`; in another recipe each departure from it
carries `# why`, on its own line or on that of a section around it. `python -m lwzlib.base.marks` writes the tables into the
page anew, between the marks that name them; the words around them stay.
"""

import re
import sys
from pathlib import Path

import yaml

from lwzlib.base.recipe import RECIPES, departures, flatten, load_recipe

PAGE = RECIPES.parent / "docs" / "departures.md"
_COMMENT = re.compile(r"\s#\s*(.*)$")
_TABLE = re.compile(r"(<!-- table: (?P<kind>not published|[\w-]+): (?P<sections>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def reasons(name: str) -> dict[str, str]:
    """{dotted name: comment} of a preset's own lines; a quantity without one has that of the nearest section around it."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}

    def walk(node: yaml.MappingNode, prefix: str, above: str) -> None:
        for key, value in node.value:
            match = _COMMENT.search(lines[key.start_mark.line])
            why = match[1] if match else above
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{prefix}{key.value}.", why)
            else:
                found[prefix + key.value] = why

    walk(yaml.compose(text), "", "")
    return found


def not_published(sections: list[str]) -> list[tuple[str, str, str]]:
    """(quantity, value in `paper`, why) of each quantity of these sections that is marked N; "" where no reason is given."""
    values = flatten(load_recipe("paper").model_dump())
    return [(name, _shown(values.get(name)), note) for name, (mark, note) in published_marks().items()
            if mark == "N" and name.split(".")[0] in sections]


def changed_quantities(name: str, sections: list[str]) -> list[tuple[str, str, str, str]]:
    """(quantity, value in `paper`, value in the preset `name`, why) of each departure in these sections."""
    why = reasons(name)
    return [(quantity, _shown(published), _shown(here), why.get(quantity, ""))
            for quantity, published, here in departures(load_recipe(name)) if quantity.split(".")[0] in sections]


def _shown(value) -> str:
    if value in ("", [], None):
        return "none"
    if isinstance(value, list) and isinstance(value[0], dict):
        return "; ".join(f"{row['at']} ({row['language']}, {row['weight']:g})" for row in value)
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def markdown_table(kind: str, sections: list[str]) -> str:
    """A Markdown table: `not published`, or the departures of a preset."""
    rows = not_published(sections) if kind == "not published" else changed_quantities(kind, sections)
    heads = ("quantity", "`paper`", *([f"`{kind}`"] if kind != "not published" else []), "why")
    cells = [heads, ["---"] * len(heads), *((f"`{first}`", *rest) for first, *rest in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)


def rewritten_page(page: str) -> str:
    """The page with every table made anew."""
    return _TABLE.sub(lambda match: match[1] + markdown_table(match["kind"], match["sections"].split()) + match[4], page)


def published_marks() -> dict[str, tuple[str, str]]:
    """{dotted name: (A, B or N, note)}, read from the comments of `paper.yaml`, where each quantity carries one."""
    found, path = {}, []
    for line in (RECIPES / "paper.yaml").read_text().splitlines():
        if match := re.match(r"(\s*)([\w-]+):[^#]*?(?:#\s*([ABN])\b[: ]*(.*))?$", line):
            indent, key, mark, note = match.groups()
            path = [*path[: len(indent) // 2], key]
            if mark:
                found[".".join(path)] = (mark, note)
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(rewritten_page(path.read_text(encoding="utf-8")), encoding="utf-8")
