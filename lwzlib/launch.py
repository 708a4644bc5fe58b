"""Stages by name, and how they are started: in this process, or as a process of their own that ends with its parent.

cold start, Writing RM -> for each arm: samples before, GRPO, samples after.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lwzlib import data
from lwzlib.recipe import Recipe
from lwzlib.runs import Run, RunError

_WEIGHTS = ("model", "data", "prompt", "cold_start")  # what every trained weight depends on
_JUDGED = (*_WEIGHTS, "writing_rm", "reward")
_SECTIONS = {
    "cold-start": _WEIGHTS,
    "writing-rm": ("model", "data", "writing_rm"),
    "samples-before": (*_JUDGED, "samples"),
    "grpo": (*_JUDGED, "grpo"),
    "samples-after": (*_JUDGED, "grpo", "samples"),
}
_SHARED = ("cold-start", "writing-rm")
_QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
# glibc gives large blocks back to the system at once; every decoding step then asks for them anew.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}


def stage_run(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str | None = None) -> Run:
    """The Run of a stage, shared by the arms or of one of them. Raises RecipeError, DataError or RunError."""
    if stage not in _SECTIONS:
        raise RunError(f"no stage {stage!r}; stages are {', '.join(_SECTIONS)}")
    queries = [q.model_dump(mode="json") for source in (recipe.data.train, recipe.data.heldout)
               for q in data.load(source, recipe.data.languages)]
    inputs = {"queries_digest": recipe.fingerprint("data", queries=queries)}
    if (pairs := Path(recipe.writing_rm.pairs)).is_file() and stage != "cold-start":
        inputs["pairs_digest"] = hashlib.sha256(pairs.read_bytes()).hexdigest()[:16]
    if stage in _SHARED:
        return Run(Path(root) / stage, recipe, seed, _SECTIONS[stage], inputs)
    about = recipe.arm(arm).model_dump(exclude={"change"})
    return Run(Path(root) / arm / stage, recipe.for_arm(arm), seed, _SECTIONS[stage], inputs | about)


def start_model(recipe: Recipe, root: str | Path, seed: int, arm: str) -> str:
    """The model that an arm starts from, made first where the recipe asks for a cold start."""
    if recipe.arm(arm).start != "base":
        raise RunError(f"arm {arm} starts from {recipe.arm(arm).start}, a stage that this version of the kit does not "
                       "have; arms that start from base can be run")
    if not recipe.cold_start.queries:
        return recipe.model.name
    from lwzlib.pretrain import cold_start

    return str(cold_start(recipe, stage_run("cold-start", recipe, root, seed)))


def run_stage(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str | None = None) -> Path:
    """Do the stage here, after the stages it needs; returns its artefact. A finished stage returns at once."""
    run = stage_run(stage, recipe, root, seed, arm)
    if stage == "cold-start":
        from lwzlib.pretrain import cold_start

        return cold_start(recipe, run)
    if stage == "writing-rm":
        from lwzlib.reward_model import train_rm

        return train_rm(recipe, run)
    start, recipe = start_model(recipe, root, seed, arm), recipe.for_arm(arm)
    trains_rm = recipe.reward.weights.writing > 0 and recipe.reward.writing.model == "stage"
    writing_rm = str(run_stage("writing-rm", recipe, root, seed)) if trains_rm else ""
    if stage == "grpo":
        from lwzlib.grpo import train_arm

        return train_arm(recipe, run, arm, start, writing_rm)
    from lwzlib.generate import samples

    return samples(recipe, run, arm, start if stage == "samples-before" else
                   str(run_stage("grpo", recipe, root, seed, arm)), writing_rm)


def launch(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str | None = None) -> Run:
    """Start a stage as the recipe says, show its lines, and return its Run when it is finished.

    Raises RunError with the last lines of a process that failed. An interrupt ends the process; the next call resumes.
    """
    run = stage_run(stage, recipe, root, seed, arm)
    if run.finished:
        print(f"{stage} of {arm or 'all arms'}: already done in {run.folder}")
    elif recipe.launch == "inline":
        run_stage(stage, recipe, root, seed, arm)
    else:
        command = [sys.executable, "-m", "lwzlib.cli", "stage", stage, "-", "--run-dir", str(root), "--seed", str(seed)]
        _stream(command + (["--arm", arm] if arm else []), recipe.model_dump_json())
    return run


def _stream(command: list[str], stdin: str) -> None:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | _ALLOCATOR | _QUIET | {"LWZ_END_WITH": str(os.getpid())})
    last: list[str] = []
    try:
        process.stdin.write(stdin)
        process.stdin.close()
        for line in process.stdout:
            print(line, end="", flush=True)
            last = [*last[-30:], line]
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        process.stdout.close()
        code = process.wait()
    if code:
        raise RunError(f"the stage ended with exit code {code}; its last lines:\n{''.join(last)}")


def end_with_parent() -> None:
    """In a launched process: leave when the parent is gone, so that a killed notebook leaves nothing running."""
    parent = int(os.environ.get("LWZ_END_WITH", "0"))
    if not parent:
        return

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
