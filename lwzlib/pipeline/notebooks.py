"""`lwz run`: the notebooks of the main job, in order, through papermill, into the run folder."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from lwzlib.base.paths import NOTEBOOKS
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, read_json, write_atomic
from lwzlib.base.run_folder import Run, stage_folders, status_of
from lwzlib.pipeline.launch import of_processes
from lwzlib.pipeline.stages import places, stage_run


class Step(NamedTuple):
    """A notebook to execute, where its executed copy goes, and its parameters."""

    notebook: str
    output: str
    parameters: dict


def steps(recipe: Recipe, folder: Path, seed: int, source: str, overrides: list[str]) -> list[Step]:
    """The notebooks of a run in order, 05 once for each arm that is trained by RL."""
    common = {"recipe": source, "seed": seed, "run_dir": str(folder.resolve()), "overrides": overrides}
    due = {stage for _, stage in places(recipe)}
    before = ["00_start_here", "01_data_and_length_ranges", "02_reward_design", *["03_writing_rm"] * ("writing-rm" in due),
              "04_grpo_step_by_step"]
    arms = [Step("05_train_grpo", f"05_train_grpo_{arm}", common | {"arm": arm})
            for arm, settings in recipe.arms.items() if settings.algorithm == "grpo"]
    after = ["06_think_vs_nothink", *["07_continual_pretraining"] * ("pretrain" in due), *["08_sft_vs_rl"] * ("sft" in due),
             "09_evaluate"]
    return [*(Step(name, name, common) for name in before), *arms, *(Step(name, name, common) for name in after)]


def overview(recipe: Recipe, root: str | Path, seed: int) -> list[dict]:
    """Each of the recipe's `stages.places`: arm, stage, state, step of how many, seconds, and the most memory."""
    return _rows(stages_of(recipe, root, seed))


def stages_of(recipe: Recipe, root: str | Path, seed: int) -> dict[tuple[str, str], Run]:
    """The Run of each of the recipe's `stages.places`."""
    return {(arm, stage): stage_run(stage, recipe, root, seed, arm) for arm, stage in places(recipe)}


def _rows(stages: dict[tuple[str, str], Run]) -> list[dict]:
    return [_row(arm, stage, run.folder) for (arm, stage), run in stages.items()]


def stages_found(root: str | Path) -> list[dict]:
    """Rows as of `overview`, of the stages that were started in a run folder, the oldest first."""
    folders = sorted(stage_folders(root), key=lambda folder: (folder / "recipe.yaml").stat().st_mtime)
    names = [folder.relative_to(root).parts for folder in folders]
    return [_row("/".join(arm), stage, folder) for folder, (*arm, stage) in zip(folders, names, strict=True)]


def _row(arm: str, stage: str, folder: Path) -> dict:
    status = status_of(folder)
    return {"arm": arm or "all arms", "stage": stage, "state": status.get("state", "to do"), "step": status.get("step"),
            "of": status.get("total"), "seconds": status.get("wall_s"), "gib": status.get("host_peak_gib")}


def show_stages(folder: Path, rows: list[dict]) -> None:
    """Print the arms and stages (rows of `overview` or `stages_found`): done, running or to do, and how long each took."""
    from rich.console import Console
    from rich.table import Table

    table = Table("arm", "stage", "state", "step", "seconds", "GiB", title=str(folder), box=None)
    for row in rows:
        step = f"{row['step']}/{row['of']}" if row["of"] else ""
        table.add_row(row["arm"], row["stage"], row["state"], step, f"{row['seconds']:.0f}" if row["seconds"] else "",
                      f"{row['gib']:.1f}" if row["gib"] else "",
                      style={"finished": "green", "to do": "dim"}.get(row["state"], "bold"))
    Console().print(table)


def run_notebooks(recipe: Recipe, folder: Path, seed: int, source: str, overrides: list[str]) -> Path:
    """Execute what is not done yet and write the report. Raises RunError before anything is executed if the folder holds a run
    of another recipe, else at the first failing cell."""
    from lwzlib.exhibits.model_card import write_cards
    from lwzlib.exhibits.page import write_report

    stages = stages_of(recipe, folder, seed)
    for stage in stages.values():
        stage.check()
    fingerprints = [recipe.fingerprint(), *(stage.fingerprint for stage in stages.values())]
    os.environ |= of_processes()  # of the kernels: some train a step or score with a model themselves
    show_stages(folder, _rows(stages))
    executed = folder / "notebooks"
    executed.mkdir(parents=True, exist_ok=True)
    record = executed / "done.json"
    todo = steps(recipe, folder, seed, source, overrides)
    done = read_json(record) if record.exists() else {}  # output: its digest, then the finished stages
    done = {output: state for output, state in done.items() if set(state[1:]) <= set(_finished(stages))}  # else removed
    write_atomic(record, json.dumps(done, indent=1))
    for number, step in enumerate(todo, 1):
        digest = _digest(step, fingerprints)
        if done.get(step.output, [""])[0] == digest:
            print(f"[{number}/{len(todo)}] {step.output}: already done", flush=True)
            continue
        print(f"[{number}/{len(todo)}] {step.output}", flush=True)
        _execute(step, executed / f"{step.output}.ipynb")
        done[step.output] = [digest, *_finished(stages)]
        write_atomic(record, json.dumps(done, indent=1))
    write_cards(folder)
    page = write_report(folder)
    show_stages(folder, _rows(stages))
    print(f"done: open {page}")
    return page


def _finished(stages: dict[tuple[str, str], Run]) -> list[str]:
    return ["/".join(place) for place, stage in stages.items() if stage.finished]


def _digest(step: Step, fingerprints: list[str]) -> str:
    source = (NOTEBOOKS / f"{step.notebook}.ipynb").read_bytes()
    return hashlib.sha256(source + json.dumps([fingerprints, step.parameters]).encode()).hexdigest()[:16]


def _execute(step: Step, output: Path) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{step.notebook}.ipynb", output, step.parameters, kernel_name="python3",
            progress_bar=False, stdout_file=sys.stdout, start_timeout=120,
            extra_arguments=["--IPKernelApp.log_level=50"])
    except PapermillExecutionError as error:
        raise RunError(f"{output} stopped in cell {error.cell_index}:\n{error.source}\n\n"
                       + "\n".join(error.traceback[-3:] or [f"{error.ename}: {error.evalue}"])) from None
