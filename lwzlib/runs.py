"""A stage's folder: what was asked (`recipe.yaml`), how far it is (`status.json`), what it measured (`metrics.jsonl`),
and what made it (`provenance.json`).

Finished with the same fingerprint: loaded. Unfinished: resumed from the last whole checkpoint, with the rows cut back
to it, so that the rows of a killed run equal those of one that was not. Another fingerprint: refused, never overwritten.
"""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from lwzlib.recipe import Recipe, flatten

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy")
INTERRUPTED = 130  # exit code of a stage that was stopped and goes on from its last checkpoint
_LOCK_PATIENCE_S = 15  # a killed parent's children need a moment to notice


class RunError(RuntimeError):
    """A run that cannot go on; the message says what to do, and what was done stays."""


class Interrupted(RunError):
    """A stage that was asked to stop, and did; the same call goes on from its last checkpoint."""


def main_process() -> bool:
    """Of the processes that train together, this one writes. True where there is but one."""
    return os.environ.get("RANK", "0") == "0"


@dataclasses.dataclass(frozen=True)
class Run:
    """One stage of one recipe and seed, in `folder`. `sections` of the recipe and `inputs` make its fingerprint. Where many
    processes train together, all read it and the main process alone locks it and writes."""

    folder: Path
    recipe: Recipe
    seed: int
    sections: tuple[str, ...]
    inputs: dict = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hex digest of its sections, seed and inputs, which a finished stage must share to be loaded."""
        return self.recipe.fingerprint(*self.sections, seed=self.seed, **self.inputs)

    @property
    def status(self) -> dict:
        """{} before the first start; else state (running, interrupted, failed, finished), step, checkpoint, ..."""
        return _said(self.folder)

    @property
    def finished(self) -> bool:
        """Raises RunError as `check` does."""
        self.check()
        return self.status.get("state") == "finished"

    def check(self) -> None:
        """Raise RunError if the folder was written by another recipe, seed or input."""
        status = self.status
        if status and status["fingerprint"] != self.fingerprint:
            theirs = yaml.safe_load((self.folder / "recipe.yaml").read_text())
            ours = self._asked()
            both = {**flatten(theirs), **flatten(ours)}
            changed = [f"{name} was {flatten(theirs).get(name)!r}, is {flatten(ours).get(name)!r}"
                       for name in both if flatten(theirs).get(name) != flatten(ours).get(name)]
            raise RunError(f"{self.folder} holds a run of another recipe ({'; '.join(changed[:5])}). "
                           "Choose another run_dir, or remove that folder")

    def _asked(self) -> dict:
        content = self.recipe.model_dump(mode="json")
        return {key: content[key] for key in self.sections} | {"seed": self.seed, "inputs": self.inputs}

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Hold the folder, mark it running, and at the end finished, interrupted or failed."""
        if not main_process():
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock"):
            self.check()
            if not self.status:
                write_atomic(self.folder / "recipe.yaml", yaml.safe_dump(self._asked(), allow_unicode=True))
                write_atomic(self.folder / "provenance.json", json.dumps(provenance(), indent=1))
            else:
                self._resumed(provenance())
            self.update(state="running", pid=os.getpid(), host=platform.node())
            started, before = time.time(), self.status.get("wall_s", 0.0)
            state = "failed"
            try:
                yield
                state = "finished"
            except KeyboardInterrupt:
                state = "interrupted"
                raise
            finally:
                with contextlib.suppress(OSError, RunError):  # a full disk must not hide the error that it caused
                    self.update(state=state, wall_s=round(before + time.time() - started, 1))

    def _resumed(self, made: dict) -> None:
        """Keep with the provenance what else made the rest of the rows: another commit, changed files, other versions."""
        path = self.folder / "provenance.json"
        before = json.loads(path.read_text())
        last = [before, *before.get("resumed", [])][-1]
        if any(last[key] != made[key] for key in ("commit", "uncommitted_changes", "versions")):
            write_atomic(path, json.dumps(before | {"resumed": [*before.get("resumed", []), made]}, indent=1))

    def update(self, **changes) -> None:
        """Set keys of `status.json`, keep the others; in the main process alone. Raises RunError if the disk is full."""
        if not main_process():
            return
        status = {"fingerprint": self.fingerprint} | self.status | changes
        write_atomic(self.folder / "status.json", json.dumps(status, indent=1))

    def rows(self, name: str = "metrics") -> list[dict]:
        """Those of `<name>.jsonl` in the folder; [] before the first."""
        return read_rows(self.folder / f"{name}.jsonl")

    def append(self, name: str, *rows: dict) -> None:
        """Add to `<name>.jsonl`, in the main process alone. Raises RunError if the disk is full."""
        if main_process():
            append_rows(self.folder / f"{name}.jsonl", rows)

    def write(self, name: str, rows) -> None:
        """All the rows, in place of what there was."""
        if main_process():
            write_rows(self.folder / f"{name}.jsonl", rows)

    def rewind(self, step: int, *names: str) -> None:
        """Drop the rows that came after `step` (and a half-written last line)."""
        for name in names:
            self.write(name, [row for row in self.rows(name) if row["step"] <= step])


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


def _said(folder: Path) -> dict:
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def status_of(folder: Path) -> dict:
    """The `status.json` of a stage, {} before its first start. A stage that was killed left the state "running": it is "killed"
    here, if it ran on this machine and nobody holds its lock."""
    status = _said(folder)
    if status.get("state") == "running" and status.get("host") == platform.node():
        with contextlib.suppress(OSError), (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status["state"] = "killed"
    return status


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


def end_with(parent: int) -> None:
    """Leave this process when `parent` is no longer its parent: nothing goes on writing after a kill."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Stop:
    """SIGUSR1, before a time limit: what trains saves and stops after its step (`asked`), all else stops at once."""

    asked = training = False

    @classmethod
    def listen(cls) -> None:
        """Take SIGUSR1 from now on; Python allows it in the main thread alone."""
        signal.signal(signal.SIGUSR1, cls._come)

    @classmethod
    def _come(cls, *_) -> None:
        cls.asked = True
        if not cls.training:
            raise KeyboardInterrupt


def commit_of(made: dict) -> str | None:
    """The commit of a `provenance.json`, with a + where it is not the whole truth: files were changed, or the run was resumed
    with others."""
    changed = made["uncommitted_changes"] or any(
        later["commit"] != made["commit"] or later["uncommitted_changes"] for later in made.get("resumed", []))
    return f"{made['commit']}+" if made["commit"] and changed else made["commit"]


def provenance() -> dict:
    """What made a result: commit, versions, hardware, time."""
    root = Path(__file__).resolve().parent.parent
    def git(*words):
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    code = ("lwzlib", "recipes", "notebooks", "pyproject.toml", "constraints.txt")  # what can change a result
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", *code)
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"commit": commit, "uncommitted_changes": bool(changes) if commit else None, "versions": versions,
            "python": platform.python_version(), "hardware": hardware(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def hardware() -> str:
    """Processor, cores and GPUs, in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {name}"
    return f"{name}, {os.cpu_count()} cores, no GPU"
