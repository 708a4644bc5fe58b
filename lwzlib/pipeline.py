"""`lwz run`: the notebooks of the main job, in order, through papermill, into the run folder.

Those that train may run side by side: each then has its share of the cores, and waits where it needs a stage that another one
does. On two cores that is faster, as much of the work keeps no more than one busy.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from lwzlib import launch
from lwzlib.recipe import Recipe
from lwzlib.runs import RunError, write_atomic

_LONGEST = "03_writing_rm"
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@dataclasses.dataclass(frozen=True)
class Step:
    """A notebook to execute, where its executed copy goes, its parameters, and whether it compares what the others made."""

    notebook: str
    output: str
    parameters: dict
    compares: bool = False


def steps(recipe: Recipe, folder: Path, seed: int, source: str, overrides: list[str]) -> list[Step]:
    """The notebooks of a run in order, 05 once for each arm that is trained by RL."""
    common = {"recipe": source, "seed": seed, "run_dir": str(folder.resolve()), "overrides": overrides}
    once = [Step(name, name, common) for name in ("00_start_here", "01_data_and_length_ranges", "02_reward_design",
                                                  "03_writing_rm", "04_grpo_step_by_step")]
    arms = [Step("05_train_grpo", f"05_train_grpo_{arm}", common | {"arm": arm})
            for arm, asked in recipe.arms.items() if asked.algorithm == "grpo"]
    pretrained = any(arm.start == "continual-pretrain" for arm in recipe.arms.values())
    names = ["06_think_vs_nothink", *["07_continual_pretraining"] * pretrained,
             *["08_sft_vs_rl"] * any(arm.algorithm == "sft" for arm in recipe.arms.values()), "09_evaluate"]
    return [*once, *arms, *(Step(name, name, common, compares=name != "08_sft_vs_rl") for name in names)]


def show(recipe: Recipe, folder: Path, seed: int) -> None:
    """Print the arms and stages: what is done, running, to do, and how long each took."""
    from rich.console import Console
    from rich.table import Table

    table = Table("arm", "stage", "state", "step", "seconds", title=str(folder), box=None)
    for row in launch.overview(recipe, folder, seed):
        step = f"{row['step']}/{row['of']}" if row["of"] else ""
        table.add_row(row["arm"], row["stage"], row["state"], step, f"{row['seconds']:.0f}" if row["seconds"] else "",
                      style={"finished": "green", "to do": "dim"}.get(row["state"], "bold"))
    Console().print(table)


def run(recipe: Recipe, folder: Path, seed: int, source: str, overrides: list[str], jobs: int = 1) -> Path:
    """Execute what is not done yet, `jobs` notebooks that train at a time, and write the report. Raises RunError at the first
    failing cell; what runs beside it is interrupted, and goes on from its checkpoint the next time."""
    from lwzlib import report

    show(recipe, folder, seed)
    executed = folder / "notebooks"
    executed.mkdir(parents=True, exist_ok=True)
    record = executed / "done.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    todo = steps(recipe, folder, seed, source, overrides)

    digests = {step.output: _digest(recipe, step) for step in todo}

    def do(step: Step) -> None:
        skip = done.get(step.output) == digests[step.output]
        print(f"[{todo.index(step) + 1}/{len(todo)}] {step.output}{': already done' * skip}", flush=True)
        if not skip:
            _execute(step, executed / f"{step.output}.ipynb")

    training, comparing = ([step for step in todo if step.compares == compares] for compares in (False, True))
    for step in itertools.chain(_side_by_side(do, training, jobs), _side_by_side(do, comparing, 1)):
        done[step.output] = digests[step.output]
        write_atomic(record, json.dumps(done, indent=1))
    page = report.write(folder)
    show(recipe, folder, seed)
    print(f"done: open {page}")
    return page


def _side_by_side(do: Callable[[Step], None], todo: list[Step], jobs: int) -> Iterator[Step]:
    """Each step when it is done: in order, or `jobs` at a time, the longest first, each with its share of the cores."""
    if jobs == 1:
        for step in todo:
            do(step)
            yield step
        return
    own = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = own or str(max(1, (os.cpu_count() or 1) // jobs))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(do, step): step for step in sorted(todo, key=lambda step: step.notebook != _LONGEST)}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while running := [future for future in futures if not future.done()]:
                for kernel in psutil.Process().children():
                    with contextlib.suppress(psutil.Error):  # it has just ended
                        kernel.send_signal(signal.SIGINT)  # as Ctrl-C does where one runs alone
                concurrent.futures.wait(running, timeout=5)
            raise
        finally:
            if own is None:
                del os.environ["OMP_NUM_THREADS"]


def _digest(recipe: Recipe, step: Step) -> str:
    source = (NOTEBOOKS / f"{step.notebook}.ipynb").read_bytes()
    return hashlib.sha256(source + json.dumps([recipe.fingerprint(), step.parameters]).encode()).hexdigest()[:16]


def _execute(step: Step, output: Path) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{step.notebook}.ipynb", output, step.parameters, kernel_name="python3", cwd=NOTEBOOKS,
            progress_bar=False, stdout_file=sys.stdout, start_timeout=120,
            extra_arguments=["--IPKernelApp.log_level=50"])
    except PapermillExecutionError as error:
        raise RunError(f"{output} stopped in cell {error.cell_index}:\n{error.source}\n\n"
                       + "\n".join(error.traceback[-3:] or [f"{error.ename}: {error.evalue}"])) from None
