"""What the comments of the recipes say: which quantities are published, and why the others are what they are.

In `paper.yaml` each quantity carries `# A`, `# B` or `# N: why this value`; in another recipe each departure from it carries
`# why`, on its own line or on that of a section around it. `python -m lwzlib.base.marks` writes the tables of
`docs/departures.md` anew, between the marks that name them; the words around them stay.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from lwzlib.base.pages import markdown_table, rewrite
from lwzlib.base.paths import DOCS
from lwzlib.base.recipe import departures, flatten, is_open, load_recipe, recipe_path

PAGE = DOCS / "departures.md"


def reasons(source: str | Path) -> dict[str, str]:
    """{dotted name: comment} of a recipe's own lines; a quantity without one has that of the nearest section around it."""
    text = recipe_path(source).read_text(encoding="utf-8")
    tokens = [token for token in yaml.scan(text) if token.start_mark.index < token.end_mark.index]
    token_ends = {token.end_mark.line: token.end_mark.column for token in tokens}  # the last on each line
    rests = {number: line[token_ends.get(number, 0) :].strip() for number, line in enumerate(text.splitlines())}
    comments = {number: rest.removeprefix("#").strip() for number, rest in rests.items() if rest.startswith("#")}
    return dict(_walk(yaml.compose(text), comments))


def _walk(node: yaml.MappingNode, comments: dict[int, str], prefix: str = "", above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.value:
        comment = comments.get(key.start_mark.line, above)
        name = prefix + key.value
        if isinstance(value, yaml.MappingNode) and not is_open(name):
            yield from _walk(value, comments, f"{name}.", comment)
        else:
            yield name, comment


def published_marks() -> dict[str, tuple[str, str]]:
    """{dotted name: (A, B or N, note)} of `paper.yaml`, where each quantity carries one."""
    matches = {name: re.fullmatch(r"([ABN])\b[: ]*(.*)", comment) for name, comment in reasons("paper").items()}
    return {name: (match[1], match[2]) for name, match in matches.items() if match}


def table_rows(kind: str, sections: list[str]) -> list[tuple[str, ...]]:
    """Rows about the quantities of these sections: (quantity, value in `paper`, why) of each that is `not published`, or
    (quantity, value in `paper`, value here, why) of each in which the preset `kind` departs; why is "" without a comment."""
    rows: list[tuple[str, ...]]
    if kind == "not published":
        values = flatten(load_recipe("paper").model_dump())
        rows = [(name, shown(values.get(name)), note) for name, (mark, note) in published_marks().items() if mark == "N"]
    else:
        why = reasons(kind)
        rows = [(name, shown(published), shown(here), why.get(name, ""))
                for name, published, here in departures(load_recipe(kind))]
    return [row for row in rows if row[0].split(".")[0] in sections]


def shown(value) -> str:
    """A quantity's value in a table."""
    if value in ("", [], {}, None):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(of_name)}" for name, of_name in value.items())
    if isinstance(value, list) and isinstance(value[0], dict):
        return "; ".join(f"{row['at']} ({row['language']}, {row['weight']:g})" for row in value)
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def made_part(name: str) -> str:
    """Part of the page of departures, by the name in its mark: `not published: <sections>` or `<preset>: <sections>`."""
    kind, sections = name.split(": ")
    heads = ("quantity", "`paper`", *([f"`{kind}`"] if kind != "not published" else []), "why")
    return markdown_table(heads, ((f"`{quantity}`", *cells) for quantity, *cells in table_rows(kind, sections.split())))


if __name__ == "__main__":
    rewrite(PAGE, made_part)
