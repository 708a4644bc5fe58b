"""Markdown pages with made parts: what stands between `<!-- made: NAME -->` and `<!-- end -->` is computed, the rest written by
hand. A test compares each page with what its maker gives now."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

_MADE = re.compile(r"(<!-- made: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def remade(page: str, make: Callable[[str], str]) -> str:
    """The page with each made part replaced by `make(NAME)`."""
    return _MADE.sub(lambda match: match[1] + make(match[2]) + match[3], page)


def rewrite(path: Path, make: Callable[[str], str]) -> None:
    """Make the parts of the page at `path` anew."""
    path.write_text(remade(path.read_text(encoding="utf-8"), make), encoding="utf-8")


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable[object]], numbers: bool = False) -> str:
    """A Markdown table; with `numbers`, all columns but the first are aligned at the right."""
    heads = list(heads)
    rule = ["---", *["--:" if numbers else "---"] * (len(heads) - 1)]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in (heads, rule, *rows))
