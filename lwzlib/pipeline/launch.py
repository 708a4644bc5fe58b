"""Stages by name, what each needs, and how they are started: in this process, or as one or many processes of their own that
end with their parent.

Shared by the arms: cold start, Writing RM; corpus -> pack -> pretrain, with what is distilled from one arm packed in.
Of an arm: samples before, then GRPO or SFT, then samples of the policy during GRPO, and samples after.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from lwzlib.base.processes import INTERRUPTED, Interrupted
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, write_atomic
from lwzlib.base.run_folder import Run
from lwzlib.pipeline import ranks, vllm_servers
from lwzlib.pipeline.stages import arm_stages, needs, run_stage, stage_run

_SPREAD = ("writing-rm", "pretrain", "sft", "grpo")  # the stages that train at scale; the others are one process
_QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
# glibc gives large blocks back to the system at once; every decoding step then asks for them anew.
# Its OpenMP threads spin while they wait: a short while is enough, and leaves the cores to others.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26),
          "GOMP_SPINCOUNT": "10000"}


def launch(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Run:
    """Start a stage as the recipe says, show its lines, and return its Run when it is finished.

    `launch` of the recipe: inline (in this process), subprocess, torchrun (`distributed.processes` on this machine) or slurm
    (on each node of the allocation); the last two spread the stages that train and start what they need first.
    Raises RunError with the last lines of a process that failed, Interrupted where one was asked to stop. An interrupt ends
    the processes, inside a Slurm job after a checkpoint; the next call resumes.
    """
    run = stage_run(stage, recipe, root, seed, arm)
    spread = recipe.launch in ("torchrun", "slurm") and stage in _SPREAD
    if run.finished:
        print(f"{stage} of {arm or 'all arms'}: already done in {run.folder}")
    elif recipe.launch == "inline":
        run_stage(stage, recipe, root, seed, arm)
    else:
        for other in needs(stage, recipe, arm) if recipe.launch != "subprocess" else []:
            launch(other[0], recipe, root, seed, other[1])
        start = [str(stage_run(name, recipe, root, seed, of).folder / "model") for name, of in needs(stage, recipe, arm)
                 if name in ("cold-start", "pretrain")] or [run.recipe.model.name]
        with contextlib.ExitStack() as around:
            before, env = around.enter_context(vllm_servers.ready(stage, recipe, run.folder, start[0])) if spread else ([], {})
            _stream(before + _command(stage, recipe, Path(root), seed, arm, run.folder), env, [run])
    return run


def launch_arm(recipe: Recipe, root: str | Path, seed: int, arm: str) -> dict[str, Run]:
    """`launch` of all stages of an arm (`arm_stages`), by name. As a subprocess they share one: each start costs seconds."""
    runs = {stage: stage_run(stage, recipe, root, seed, arm) for stage in arm_stages(recipe, arm)}
    todo = [stage for stage, run in runs.items() if not run.finished]
    if todo and recipe.launch == "subprocess":
        command = _command(",".join(todo), recipe, Path(root), seed, arm, runs[todo[0]].folder)
        _stream(command, {}, [runs[stage] for stage in todo])
    else:
        for stage in runs:
            launch(stage, recipe, root, seed, arm)
    return runs


def _command(stage: str, recipe: Recipe, root: Path, seed: int, arm: str, folder: Path) -> list[str]:
    """Do the stage, or several (a,b), in a process of its own; the recipe lies in the run's folder, which all nodes see."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("logs/failed-*.json"):
        old.unlink()
    write_atomic(folder / "asked.yaml", recipe.model_dump_json())  # JSON is YAML too
    return [sys.executable, "-m", "lwzlib.cli.main", "stage", stage, str((folder / "asked.yaml").resolve()), "--run-dir",
            str(root.resolve()), "--seed", str(seed), *(["--arm", arm] if arm else [])]


def _stream(command: list[str], env: dict, runs: list[Run]) -> None:
    """Do what the command does for these runs, one after the other."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | MALLOC | _QUIET | {"LWZ_END_WITH": str(os.getpid())} | env)
    assert process.stdout
    last: list[str] = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = [*last[-30:], line]
    except KeyboardInterrupt:
        _end(process, process.stdout)
        raise
    finally:
        process.stdout.close()
        code = process.wait()
    run = next((run for run in runs if not run.finished), runs[-1])  # where it stopped
    failed = ranks.failure(run.folder / "logs")
    if code == INTERRUPTED and not failed:
        raise Interrupted(f"the stage was asked to stop, and did after step {run.status.get('checkpoint_step', 0)}; the same "
                          "call goes on from there")
    if code:
        if run.status.get("state") in ("running", "interrupted"):  # its main process was ended with the others
            run.update(state="failed")
        said = failed or f"its last lines:\n{''.join(last)}"
        raise RunError(f"the stage ended with exit code {code}; {said}")


def _end(process: subprocess.Popen, said: Iterable[str]) -> None:
    """Stop a stage. In a Slurm job an interrupt says that the time ends: the stage saves first; a second one stops it now."""
    for number in [signal.SIGUSR1] * ("SLURM_JOB_ID" in os.environ) + [signal.SIGINT]:
        process.send_signal(number)
        try:
            for line in said:
                print(line, end="", flush=True)
            process.wait()
            return
        except KeyboardInterrupt:
            continue
