"""A stage's folder: the recipe it was started with (`recipe.yaml`), its state (`status.json`), what it measured
(`metrics.jsonl`), and what made it (`provenance.json`).

Finished with the same fingerprint: loaded. Unfinished: resumed from the last whole checkpoint, with the rows cut back
to it, so that the rows of a killed run equal those of one that was not. Another fingerprint: refused, never overwritten.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from lwzlib.base.processes import main_process
from lwzlib.base.provenance import provenance
from lwzlib.base.recipe import Recipe, flatten
from lwzlib.base.rows import RunError, append_rows, locked, read_rows, read_yaml, write_atomic, write_rows


@dataclasses.dataclass(frozen=True)
class Run:
    """One stage of one recipe and seed, in `folder`; `sections` of the recipe and `inputs` make its fingerprint. Where many
    processes train together, all read it, and the main process alone locks it and writes."""

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
        """Content of `status.json`: state (running, interrupted, failed, finished), step, ...; {} before the first start."""
        return _status(self.folder)

    @property
    def finished(self) -> bool:
        """Whether its work is done. Raises RunError as `check` does."""
        self.check()
        return self.status.get("state") == "finished"

    def check(self) -> None:
        """Raise RunError if the folder was written by another recipe, seed or input."""
        if not (status := self.status) or status["fingerprint"] == self.fingerprint:
            return
        theirs, ours = flatten(read_yaml(self.folder / "recipe.yaml")), flatten(self._content())
        changed = [f"{name} was {theirs.get(name)!r}, is {ours.get(name)!r}"
                   for name in theirs | ours if theirs.get(name) != ours.get(name)]
        raise RunError(f"{self.folder} holds a run of another recipe ({'; '.join(changed[:5])}). "
                       "Choose another run_dir, or remove that folder")

    def _content(self) -> dict:
        """Content of `recipe.yaml`, of which the fingerprint is made."""
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
                write_atomic(self.folder / "recipe.yaml", yaml.safe_dump(self._content(), allow_unicode=True))
            self._keep(provenance())
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

    def _keep(self, made: dict) -> None:
        """Write the provenance; of a resumed run, add what else made the rest of its rows: another commit, changed files,
        other versions."""
        path = self.folder / "provenance.json"
        if self.status:
            first = json.loads(path.read_text())
            resumed = first.get("resumed", [])
            last = [first, *resumed][-1]
            if all(last[key] == made[key] for key in ("commit", "uncommitted_changes", "versions")):
                return
            made = first | {"resumed": [*resumed, made]}
        write_atomic(path, json.dumps(made, indent=1))

    def update(self, **changes) -> None:
        """Set keys of `status.json`, keep the others; in the main process alone. Raises RunError if the disk is full."""
        if main_process():
            status = {"fingerprint": self.fingerprint} | self.status | changes
            write_atomic(self.folder / "status.json", json.dumps(status, indent=1))

    def rows(self, name: str = "metrics") -> list[dict]:
        """Rows of `<name>.jsonl` in the folder; [] before the first."""
        return read_rows(self.folder / f"{name}.jsonl")

    def append(self, name: str, *rows: dict) -> None:
        """Add to `<name>.jsonl`, in the main process alone. Raises RunError if the disk is full."""
        if main_process():
            append_rows(self.folder / f"{name}.jsonl", rows)

    def write(self, name: str, rows: Iterable[dict]) -> None:
        """Replace the rows of `<name>.jsonl`, in the main process alone."""
        if main_process():
            write_rows(self.folder / f"{name}.jsonl", rows)

    def rewind(self, step: int, *names: str) -> None:
        """Drop the rows that came after `step` (and a half-written last line)."""
        for name in names:
            self.write(name, [row for row in self.rows(name) if row["step"] <= step])


def _status(folder: Path) -> dict:
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def status_of(folder: Path) -> dict:
    """The `status.json` of a stage, {} before its first start. A stage that was killed left the state "running": it is "killed"
    here, if it ran on this machine and nobody holds its lock."""
    status = _status(folder)
    if status.get("state") == "running" and status.get("host") == platform.node():
        with contextlib.suppress(OSError), (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kind of lock that filelock takes
            status["state"] = "killed"
    return status
