"""Rows in and out: read from JSONL files, the kit or the hub, checked one by one, and written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from lwzlib.base.paths import QUERIES

_LOCK_PATIENCE_S = 15  # a killed parent's children need a moment to notice
_MIB = 2**20


class RunError(RuntimeError):
    """A run that cannot go on; the message says what to do, and what was done stays."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line, the field and what would be right."""


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file, [] without the file. A last line that a kill cut short is left out; another broken one raises
    ValueError."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


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


def sha256(path: Path) -> str:
    """Hex digest of a file; empty if there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: str | Path) -> str:
    """Hex digest of a file, or of a folder's files without hidden ones: their names and sizes, and the first and last MiB of
    the first 64, so that even weights and corpora take no time."""
    digest, root = hashlib.sha256(), Path(path)

    def counts(file: Path) -> bool:  # a download keeps hidden notes of its own
        return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)

    for i, file in enumerate(filter(counts, [root] if root.is_file() else sorted(root.rglob("*")))):
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


def rows_of(source: str, part: int = 0, parts: int = 1) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of each row of a JSONL file, `kit:<name>` or `hub:<dataset>`; of one of `parts` shares, without
    parsing the others. Raises DataError if there is no such file or dataset, or a line is not JSON."""
    if source.startswith("hub:"):
        rows = _hub_dataset(source)
        yield from ((f"{source}, row {i}", rows[i]) for i in range(part, len(rows), parts))
        return
    path = QUERIES / f"{source.removeprefix('kit:')}.jsonl" if source.startswith("kit:") else Path(source)
    if not path.is_file():
        kit = ", ".join(f"kit:{file.stem}" for file in sorted(QUERIES.glob("*.jsonl")))
        raise DataError(f"no file {source}; give a .jsonl file, hub:<dataset>, or one of {kit}")
    with path.open("rb") as file:
        for i, line in enumerate(file):
            if i % parts == part and line.strip():
                place = f"{path}, line {i + 1}"
                try:
                    row = json.loads(line)
                except ValueError as error:  # bad JSON or bad UTF-8
                    raise DataError(f"{place}: not JSON: {error}") from None
                yield place, row


def _hub_dataset(source: str):
    from datasets import load_dataset

    try:
        return load_dataset(source.removeprefix("hub:"), split="train")
    except Exception as error:  # the hub raises many kinds; each means that the data are not to be had
        raise DataError(f"cannot load {source}: {type(error).__name__}: {error}. It needs network and the hub; "
                        "`kit:train` needs neither") from error
