"""Rows in and out: read from JSONL files, the kit or the hub, checked one by one, and written whole or not at all."""

import bz2
import codecs
import contextlib
import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from lwzlib.base.paths import QUERIES

_LOCK_PATIENCE_S = 15  # a killed parent's children need a moment to notice
_MIB = 2**20
_OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED, _OTHER_ARCHIVES = tuple(_OPENERS), (".zst", ".zip", ".lz4", ".7z", ".tar", ".tgz", ".br")
CARD_MARK = "<!-- made by lwz from the rows of the run -->"  # ends a model card that the kit wrote
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][\da-fA-F]{2}")


class RunError(RuntimeError):
    """A run that cannot go on; the message says what to do, and what was done stays."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line, the field and what would be right."""


def decoded(content: bytes, place: str) -> str:
    """Text of bytes, by the one rule of every reader: UTF-8, a byte-order mark left out. Raises DataError for anything else."""
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{place} is UTF-16; make it UTF-8, such as by `iconv -f UTF-16 -t UTF-8`")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8: {error}") from None
    if "\0" in text:
        raise DataError(f"{place} holds NUL bytes: it is damaged, or UTF-16 or another binary form; make it UTF-8")
    return text


def open_unpacked(path: str | Path) -> IO[bytes]:
    """The file, unpacked where its name ends in .gz, .bz2 or .xz. Raises DataError for an archive of another kind."""
    suffix = Path(path).suffix
    if suffix in _OTHER_ARCHIVES:
        raise DataError(f"{path}: {suffix} files are not read; unpack it, or pack it as .gz, .bz2 or .xz")
    return _OPENERS.get(suffix, open)(path, "rb")


def read_text(path: str | Path) -> str:
    """Text of a file, unpacked and `decoded`. Raises DataError for one that is not UTF-8 or cannot be unpacked."""
    return decoded(b"".join(lines_of(path)), str(path))


def lines_of(path: str | Path) -> Iterator[bytes]:
    """Lines of a file, unpacked. Raises DataError for an archive that is cut or damaged."""
    with open_unpacked(path) as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, OSError) as error:
            raise DataError(f"{path} cannot be read to its end: {error}") from None


def read_json(path: Path) -> Any:
    """Content of a JSON file that the kit wrote. Raises DataError for one that is damaged, as by a loss of power."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        size = path.stat().st_size
        raise DataError(f"{path} is damaged ({size} bytes, no JSON: {error}): restore it, or make it again") from None


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file that the kit wrote, [] without the file. A last line that a kill cut short is left out. Raises
    DataError for another broken one."""
    rows, damaged = rows_before_damage(path)
    if damaged:
        raise DataError(f"{path}, line {damaged} is damaged: restore the file, or make it again")
    return rows


def rows_before_damage(path: Path) -> tuple[list[dict], int]:
    """(rows up to the first line that is damaged, its number; 0 if there is none)."""
    parsed = _parsed_lines(path)
    rows = _before_damage(parsed)
    return rows, len(rows) + 1 if len(rows) < len(parsed) else 0


def _before_damage(parsed: list) -> list[dict]:
    return parsed[: parsed.index(None)] if None in parsed else parsed


def _parsed_lines(path: Path) -> list:
    """Row of each line, None for a damaged one; without a last line that a kill cut short."""
    rows: list = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if line.endswith(b"\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                rows.append(None)
    return rows


def read_yaml(path: Path) -> Any:
    """Content of a YAML file of the kit: a table of texts, the ledger, or the recipe of a stage."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Replace what the file held by these rows."""
    write_atomic(path, _jsonl(rows))


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    """Add all rows or none: if the disk is full, the file is cut back and RunError says so."""
    rest = _jsonl(rows).encode("utf-8", "surrogatepass")
    with path.open("ab", buffering=0) as file:  # unbuffered: closing has nothing left to write, so cannot fail
        size = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise _not_written(path, error) from error


def write_atomic(path: Path, text: str) -> None:
    """Write the file so that a reader, or a kill, sees the old content or the new, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> RunError:
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return RunError(f"cannot write {path}: {why}. Nothing before this row is lost; make room and start again, "
                    "and the run goes on from its last checkpoint")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; a killed process holds none. Raises RunError if another still has it after 15 seconds."""
    try:
        lock = FileLock(path, timeout=_LOCK_PATIENCE_S, fallback_to_soft=False).acquire()  # a soft lock would survive a kill
    except Timeout:
        raise RunError(f"{path.parent} is in use by another process; wait for it, or stop it") from None
    with lock:
        yield


@contextlib.contextmanager
def kept_rows(path: Path, in_order: bool) -> Iterator[list[dict]]:
    """Rows of a JSONL file to which this process alone adds, inside the block. A last line that a kill cut short is cut off, so
    that the next row starts a line of its own; so are damaged lines, with all that follow where the rows stand `in_order`.
    Raises RunError if another process has the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        parsed = _parsed_lines(path)
        rows = _before_damage(parsed) if in_order else [row for row in parsed if row is not None]
        if lost := len(parsed) - len(rows):
            print(f"{path}: {lost} rows are left out, which are damaged or follow a damaged one", flush=True)
        if lost or (path.exists() and not path.read_bytes().endswith(b"\n")):
            write_rows(path, rows)
        yield rows


def sha256(path: Path) -> str:
    """Hex digest of a file; empty if there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def visible_files(folder: Path) -> list[Path]:
    """Files under a folder, in order, without hidden ones: a download keeps hidden notes of its own."""
    return [file for file in sorted(folder.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _is_card(file: Path) -> bool:
    return file.name == "README.md" and CARD_MARK.encode() in file.read_bytes()


def digest_of(path: str | Path) -> str:
    """Hex digest of a file, or of a folder's files without hidden ones: their names and sizes, and the first and last MiB of
    the first 64, so that even weights and corpora take no time. A model card of the kit's own is left out: it is made anew
    when there is more to say, and the model stays the same."""
    digest, root = hashlib.sha256(), Path(path)
    for i, file in enumerate([root] if root.is_file() else [file for file in visible_files(root) if not _is_card(file)]):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)} {size}\n".encode())
        if i < 64:
            with file.open("rb") as content:
                digest.update(content.read(_MIB))
                content.seek(max(size - _MIB, _MIB))
                digest.update(content.read(_MIB))
    return digest.hexdigest()[:16]


def validated(place: str, row, kind: type[BaseModel]):
    """The row as a `kind`. Raises DataError with the place, the field and what is wrong."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        shown = f" = {problem['input']!r:.200}" if field and problem["type"] != "missing" else ""
        raise DataError(": ".join(filter(None, (place, field + shown, problem["msg"])))) from None


_TABLES = (".parquet", ".csv")  # files that `datasets` reads


def rows_of(source: str, part: int = 0, parts: int = 1) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of each row of a JSONL file, a .parquet or .csv file, `kit:<name>`, or `hub:<dataset>` with
    an optional `:<split>`; of one of `parts` shares, without parsing the others. Raises DataError if there is no such file or
    dataset, or a line is not JSON."""
    if source.startswith("hub:") or Path(source).suffix in _TABLES:
        rows = _dataset(source)
        yield from ((f"{source}, row {i}", rows[i]) for i in range(part, len(rows), parts))
        return
    path = QUERIES / f"{source.removeprefix('kit:')}.jsonl" if source.startswith("kit:") else Path(source)
    if not path.is_file():
        kit = ", ".join(f"kit:{file.stem}" for file in sorted(QUERIES.glob("*.jsonl")))
        raise DataError(f"no file {source}; give a .jsonl file, hub:<dataset>, or one of {kit}")
    for i, line in enumerate(lines_of(path)):
        if i % parts == part and line.strip():
            place = f"{path}, line {i + 1}"
            yield place, _row(place, decoded(line, place))


def _row(place: str, line: str) -> Any:
    try:
        row = json.loads(line)
        if _SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a pair, which no file, tokenizer or server takes
        raise DataError(f"{place}: a half of a surrogate pair (\\ud800 to \\udfff) is no character: write \\ufffd in its place"
                        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from None
    return row


def _dataset(source: str):
    from datasets import load_dataset

    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        if source.startswith("hub:"):
            return load_dataset(name, split=split or "train")
        return load_dataset(Path(source).suffix[1:], data_files=source, split="train")
    except Exception as error:  # the library raises many kinds; each means that the data are not to be had
        needs = "It needs network and the hub; `kit:train` needs neither" if source.startswith("hub:") else "Is it such a file?"
        raise DataError(f"cannot load {source}: {type(error).__name__}: {error}. {needs}") from error
