"""Trackers: TensorBoard, Trackio and Weights & Biases show the rows of a stage while it trains.

A tracker gets what `metrics.jsonl` has, under the same names. When a stage starts again it gets every row that it lacks, so
what a kill has cut off comes back. One that fails is left out until then, and the run goes on: its rows are in the file.
Keys and addresses come from the environment alone (WANDB_API_KEY, TRACKIO_SPACE_ID); Trackio is local without them.
"""

import functools
import hashlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run, provenance_of


class Tracker(NamedTuple):
    """A tracker that is open. `first`: the first step that it lacks."""

    first: int
    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


def _tensorboard(run: Run) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)  # every row is written again, so that no step stands there twice
    writer = SummaryWriter(str(folder))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(0, log, writer.close)


def _trackio(run: Run) -> Tracker:
    import trackio

    project, name = run.recipe.name, _name(run)
    try:
        for earlier in trackio.Api().runs(project):
            if earlier.name == name:
                earlier.delete()
    except ValueError:  # no such project here
        pass
    made = trackio.init(project, name, config=run.content, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    return Tracker(made._next_step, lambda values, step: made.log(values, step=step), made.finish)


def _wandb(run: Run) -> Tracker:
    import wandb

    name = _name(run)
    made = wandb.init(project=run.recipe.name, name=name, id=name.rpartition(" ")[2], config=run.content, resume="allow",
                      dir=str(run.folder))
    return Tracker(made.step, lambda values, step: made.log(values, step=step), made.finish)


TRACKERS: dict[str, Callable[[Run], Tracker]] = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


def _name(run: Run) -> str:
    """Arm and stage, seed, and a digest of the folder and when it was started: two folders never share a run of a tracker."""
    started = f"{run.folder.resolve()} {provenance_of(run.folder)['started']}"
    return f"{run.folder.parent.name}/{run.folder.name} seed {run.seed} {hashlib.sha256(started.encode()).hexdigest()[:8]}"


class Trackers:
    """The trackers of a run, in the process that writes its rows. Raises RunError where one cannot start."""

    def __init__(self, run: Run):
        self._open: dict[str, Tracker] = {}
        for name in run.recipe.tracking.report_to:
            try:
                self._open[name] = TRACKERS[name](run)
            except Exception as error:  # each package has its own kinds
                raise RunError(f"tracking.report_to: {name} cannot start: {type(error).__name__}: {error}") from error
        for row in run.rows():
            self.log(row)

    def log(self, row: dict) -> None:
        """Hand on the numbers of a row; a gap (None) stays one."""
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        for name, tracker in list(self._open.items()):
            if row["step"] >= tracker.first:
                self._try(name, functools.partial(tracker.log, values, row["step"]))

    def close(self) -> None:
        """Send what is left."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)

    def _try(self, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # a tracker must not end a run
            print(f"{name} failed ({type(error).__name__}: {error}) and gets no more rows; metrics.jsonl has them all, and "
                  f"{name} gets them when the stage starts again", flush=True)
            del self._open[name]
