"""Rows in and out: JSONL and other sources of rows, checked one by one; files that are written whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError

from lwzlib.base.paths import QUERIES

_LOCK_PATIENCE_S = 15  # a killed parent's children need a moment to notice
_MIB = 2**20


class RunError(RuntimeError):
    """A run that cannot go on; the message says what to do, and what was done stays."""


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file; a last line that a kill cut short is left out, any other broken line is an error."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return [json.loads(line) for line in whole]


def write_rows(path: Path, rows) -> None:
    """All the rows, in place of what the file held."""
    write_atomic(path, "".join(_line(row) for row in rows))


def append_rows(path: Path, rows) -> None:
    """Add rows, or none of them: if the disk is full, the file is cut back and RunError says so."""
    data = "".join(_line(row) for row in rows).encode("utf-8", "surrogatepass")
    with path.open("ab", buffering=0) as file:  # unbuffered: closing has nothing left to write, so cannot fail
        size, rest = file.tell(), data
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise _disk(error, path) from error


def write_atomic(path: Path, text: str) -> None:
    """The old content or the new, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise _disk(error, path) from error


def _disk(error: OSError, path: Path) -> RunError:
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return RunError(f"cannot write {path}: {why}. Nothing before this row is lost; make room and start again, "
                    "and the run goes on from its last checkpoint")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. Raises RunError if another process still has it after 15 seconds."""
    with path.open("a+") as file:
        for waited in range(_LOCK_PATIENCE_S + 1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited == _LOCK_PATIENCE_S:
                    raise RunError(f"{path.parent} is in use by another process; wait for it, or stop it") from None
                time.sleep(1)
        yield


class DataError(ValueError):
    """Queries that cannot be used; the message names the file, the line, the field and what would be right."""


def digest_of(path: str | Path) -> str:
    """Hex digest of a file, or of a folder's files but hidden ones: names, sizes, and of the first 64 the first and the last
    MiB, so that even weights and corpora take no time."""
    found, root = hashlib.sha256(), Path(path)
    files = [file for file in ([root] if root.is_file() else sorted(root.rglob("*"))) if file.is_file()
             and not any(part.startswith(".") for part in file.relative_to(root).parts)]  # a download keeps notes of its own
    for i, file in enumerate(files):
        size = file.stat().st_size
        found.update(f"{file.relative_to(root)} {size}\n".encode())
        if i < 64:
            with file.open("rb") as content:
                found.update(content.read(_MIB))
                content.seek(max(size - _MIB, _MIB))
                found.update(content.read(_MIB))
    return found.hexdigest()[:16]


def validated(place: str, row, kind: type[BaseModel]):
    """The row as a `kind`; a DataError names the place, the field and what is wrong."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        shown = "" if problem["type"] == "missing" or not field else f" = {problem['input']!r:.200}"
        raise DataError(f"{place}: {field}{shown}: {problem['msg']}".replace(": : ", ": ")) from None


def rows_of(source: str, part: int = 0, parts: int = 1):
    """(where it stands, row) for each row of a JSONL file, `kit:<name>` or `hub:<dataset>`, or for one of `parts` shares of
    them, without reading the others' content; DataError if there is no such file or dataset."""
    if source.startswith("hub:"):
        from datasets import load_dataset

        try:
            rows = load_dataset(source.removeprefix("hub:"), split="train")
        except Exception as error:  # the hub raises many kinds; each means that the data are not to be had
            raise DataError(f"cannot load {source}: {type(error).__name__}: {error}. It needs network and the hub; "
                            "`kit:train` needs neither") from error
        yield from ((f"{source}, row {i}", rows[i]) for i in range(part, len(rows), parts))
        return
    path = QUERIES / f"{source.removeprefix('kit:')}.jsonl" if source.startswith("kit:") else Path(source)
    if not path.is_file():
        kit = ", ".join(f"kit:{p.stem}" for p in sorted(QUERIES.glob("*.jsonl")))
        raise DataError(f"no file {source}; give a .jsonl file, hub:<dataset>, or one of {kit}")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number % parts == (part + 1) % parts and line.strip():
                yield f"{path}, line {number}", _json(f"{path}, line {number}", line)


def _json(place: str, line: bytes):
    try:
        return json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise DataError(f"{place}: not JSON: {error}") from None
