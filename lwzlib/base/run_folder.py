"""A stage's folder: the recipe it was started with (`recipe.yaml`), its state (`status.json`), what it measured
(`metrics.jsonl`), and what made it (`provenance.json`).

Finished with the same fingerprint: loaded. Unfinished: resumed from the last whole checkpoint, with the rows cut back
to it, so that the rows of a killed run equal those of one that was not. Another fingerprint: refused, never overwritten.

A loss of power can leave files empty or full of NUL bytes. A damaged status is made anew from what lies beside it; what made
the first rows is then unknown, and stays so; damaged rows are dropped if the last checkpoint is older, else named.
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

from lwzlib.base.processes import forget_peak_memory, main_process, peak_memory_gib
from lwzlib.base.provenance import provenance
from lwzlib.base.recipe import Recipe, flatten
from lwzlib.base.rows import (
    DataError,
    RunError,
    append_rows,
    locked,
    read_json,
    read_rows,
    read_yaml,
    rows_before_damage,
    write_atomic,
    write_rows,
)

_AGAIN = "remove {} and run the same command again"


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
        if not (status := self.status) or status.get("fingerprint") == self.fingerprint:
            return
        theirs, ours = flatten(self._kept_content()), flatten(self.content)
        changed = [f"{name} was {theirs.get(name)!r}, is {ours.get(name)!r}"
                   for name in theirs | ours if theirs.get(name) != ours.get(name)]
        if not changed and status["state"] == "damaged":
            return
        raise RunError(f"{self.folder} holds a run of another recipe ({'; '.join(changed[:5])}). "
                       "Choose another run_dir, or remove that folder")

    def _kept_content(self) -> dict:
        path = self.folder / "recipe.yaml"
        try:
            return dict(read_yaml(path))
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            raise DataError(f"{path} is damaged or lost: restore it, or {_AGAIN.format(self.folder)}") from None

    @property
    def content(self) -> dict:
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
                write_atomic(self.folder / "recipe.yaml", yaml.safe_dump(self.content, allow_unicode=True))
            self._keep(provenance())
            rebuilt = self._last_checkpoint() if self.status.get("state") == "damaged" else {}
            self.update(state="running", pid=os.getpid(), host=platform.node(), **rebuilt)
            started, before, peak = time.time(), self.status.get("wall_s", 0.0), self.status.get("host_peak_gib", 0.0)
            earlier = forget_peak_memory()
            state = "failed"
            try:
                yield
                state = "finished"
            except KeyboardInterrupt:
                state = "interrupted"
                raise
            finally:
                with contextlib.suppress(OSError, RunError):  # a full disk must not hide the error that it caused
                    self.update(state=state, wall_s=round(before + time.time() - started, 1),
                                host_peak_gib=_largest(peak, peak_memory_gib(earlier)))

    def _keep(self, made: dict) -> None:
        """Write the provenance; of a resumed run, add what else made the rest of its rows: another commit, changed files,
        other versions."""
        path = self.folder / "provenance.json"
        if self.status:
            first = provenance_of(self.folder)
            resumed = first.get("resumed", [])
            last = [first, *resumed][-1]
            if all(last[key] == made[key] for key in ("commit", "uncommitted_changes", "versions")):
                return
            made = first | {"resumed": [*resumed, made]}
        write_atomic(path, json.dumps(made, indent=1))

    def _last_checkpoint(self) -> dict:
        """What `status.json` says of the last checkpoint, from the folder of checkpoints; {} without a whole one."""
        for path in sorted(self.folder.glob("checkpoints/checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
            with contextlib.suppress(OSError, DataError):  # the trainer writes this file last
                step = read_json(path / "trainer_state.json")["global_step"]
                print(f"{self.folder}/status.json was damaged: the stage goes on from {path.name}", flush=True)
                return {"checkpoint": path.name, "checkpoint_step": step}
        return {}

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
        """Drop the rows that came after `step`, and a half-written last line. Raises DataError if earlier rows are damaged."""
        for name in names:
            rows, damaged = rows_before_damage(self.folder / f"{name}.jsonl")
            if damaged and step and (not rows or rows[-1]["step"] <= step):  # what is damaged may be of an earlier step
                raise DataError(f"{self.folder / name}.jsonl, line {damaged} is damaged, and older than the last checkpoint: "
                                f"restore the file, or {_AGAIN.format(self.folder)}")
            self.write(name, [row for row in rows if row["step"] <= step])


def _status(folder: Path) -> dict:
    try:
        status = read_json(folder / "status.json")
        return status if isinstance(status, dict) else {"state": "damaged"}
    except FileNotFoundError:
        return {}
    except DataError:
        return {"state": "damaged"}


def _largest(*peaks_gib: float | None) -> float | None:
    """Largest of the peaks; None if one of them is not known."""
    known = [peak for peak in peaks_gib if peak is not None]
    return round(max(known), 2) if len(known) == len(peaks_gib) else None


def provenance_of(folder: Path) -> dict:
    """The `provenance.json` of a stage; with nothing known in it where the file is damaged or lost."""
    try:
        return read_json(folder / "provenance.json")
    except (FileNotFoundError, DataError):
        return {"commit": None, "uncommitted_changes": None, "versions": {}, "python": "unknown", "hardware": "unknown",
                "started": ""}


def status_of(folder: Path) -> dict:
    """The `status.json` of a stage, {} before its first start. A stage that was killed left the state "running": it is "killed"
    here, if it ran on this machine and nobody holds its lock."""
    status = _status(folder)
    if status.get("state") == "running" and status.get("host") == platform.node():
        with contextlib.suppress(OSError), (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kind of lock that filelock takes
            status["state"] = "killed"
    return status


def has_model(stage: Path) -> bool:
    """Whether a stage is finished and has left its model."""
    return (stage / "model").is_dir() and status_of(stage).get("state") == "finished"


def stage_folders(root: str | Path) -> list[Path]:
    """Folders of the stages that were started in a run folder, and of those that it shares with another."""
    return [path.parent for pattern in ("*/status.json", "*/*/status.json") for path in sorted(Path(root).glob(pattern))]
