"""A few minutes of the real thing on a new machine, before hours are spent on it: GRPO that is killed, resumed and looked at.

Every check is a function of what a short run of GRPO left: "" where it passed, else what is wrong. What this machine lacks is
skipped, and said. The row that is written has the measurements that `lwz estimate` only assumes.
"""

import importlib.util
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lwzlib.base import models
from lwzlib.base.provenance import provenance
from lwzlib.base.recipe import Recipe, load_recipe
from lwzlib.base.rows import RunError, append_rows
from lwzlib.base.run_folder import Run
from lwzlib.cluster.estimate import make_plan, total, training_memory, writing_memory
from lwzlib.cluster.readiness import here
from lwzlib.pipeline import launch, ranks
from lwzlib.pipeline.stages import stage_run

ARM, STEPS = "base-think", 4
_KILL_AT, _PATIENCE_S = 2, 3600
_LEAST_MOVED = 0.5  # bfloat16 weights: a quarter at most
_LARGEST_DIFFERENCE = 0.1  # of log-probabilities, mean a token; bfloat16 on two engines: 0.005 to 0.02


class Trial(NamedTuple):
    """A finished run, which was killed after a step, and how the completions were written."""

    run: Run
    engine: str  # none, colocate or server
    killed_at: int


def check_gpu(folder: Path, model: str, say: Callable = print) -> bool:
    """Check this machine with a short GRPO of `model` (as in a recipe) in each way that it has; whether all passed. Leaves
    the runs and `check.jsonl` in the folder."""
    passed = True
    os.environ["CUDA_VISIBLE_DEVICES"] = launch.first_gpu()  # TRL takes one in a process
    for engine, lacking in engines():
        if lacking:
            say(f"skipped  vllm.mode {engine}: {lacking}")
            continue
        trial = _tried(_recipe(model, engine), folder / f"{engine}-{time.strftime('%Y%m%d-%H%M%S')}", engine)
        wrong = {name: look(trial) for name, look in CHECKS.items()}
        for name, problem in wrong.items():
            skipped = problem is None
            say(f"{'skipped' if skipped else 'WRONG  ' if problem else 'ok     '}  vllm.mode {engine}: {name}"
                + (f": {problem}" if problem else ""))
        passed = passed and not any(wrong.values())
        append_rows(folder / "check.jsonl", [measured(trial) | {"wrong": wrong} | provenance()])
    say("PASS" if passed else f"FAILED: see the lines above, and the logs in {folder}")
    return passed


def engines() -> list[tuple[str, str]]:
    """(vllm.mode, what this machine lacks for it) of each way to write completions."""
    no_vllm = "" if importlib.util.find_spec("vllm") else "vllm is not installed"
    no_gpu = "" if torch.cuda.is_available() else "there is no CUDA GPU"
    alone = "" if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1 else "a server wants a Slurm allocation of two nodes"
    return [("none", ""), ("colocate", no_gpu or no_vllm), ("server", no_gpu or no_vllm or alone)]


def _recipe(model: str, engine: str) -> Recipe:
    """Four steps of all weights from a short cold start, without which all rewards may be 0 and nothing learnt. The learning
    rate is so large that an engine which kept old weights would be noticed."""
    frame = "chat" if models.load_tokenizer(model).chat_template else "plain"
    served = {"launch": "slurm", "distributed.nodes": 2, "vllm.nodes": 1} if engine == "server" else {}
    return load_recipe("nano", {
        "name": "check", "model.name": model, "model.attention": "sdpa", "model.frame": frame,
        "cold_start.queries": 16, "cold_start.max_new_tokens": 64, "grpo.group_size": 4, "grpo.micro_batch_completions": 4,
        "grpo.sampling.max_new_tokens": 512 if torch.cuda.is_available() else 64,
        "reward.weights.writing": 0.0, "reward.format.encoder": "", "grpo.lora.rank": 0,
        "grpo.steps": STEPS, "grpo.checkpoint_every_steps": 1, "grpo.learning_rate": 1e-4, "grpo.stop": ["</answer>"],
        "evaluation.every_steps": 0, "vllm.mode": engine, "vllm.memory_share": 0.3, "vllm.sleep": engine == "colocate",
        "distributed.start_s": 600} | served)


def _tried(recipe: Recipe, root: Path, engine: str) -> Trial:
    """GRPO, killed after a step and started again. Raises RunError with the end of its output if it fails."""
    run = stage_run("grpo", recipe, root, 0, ARM)
    if engine != "server":  # whose ranks lie on other nodes
        command = launch.stage_command("grpo", recipe, root, 0, ARM, run.folder)
        _killed_at(_KILL_AT, run, command, root / "killed.log")
    killed_at = run.status.get("checkpoint_step", 0)
    return Trial(launch.launch("grpo", recipe, root, 0, ARM), engine, killed_at)


def _killed_at(step: int, run: Run, command: list[str], log: Path) -> None:
    """Start a stage and kill it when a step is saved. Raises RunError if that takes longer than an hour."""
    deadline = time.monotonic() + _PATIENCE_S
    with log.open("wb") as file, subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"LWZ_END_WITH": str(os.getpid())}) as process:
        try:
            while process.poll() is None and run.status.get("checkpoint_step", 0) < step:
                if time.monotonic() > deadline:
                    raise RunError(f"no step was saved within {_PATIENCE_S} s; the end of {log}:\n{ranks.tail(log)}")
                time.sleep(0.05)
        finally:
            process.kill()


def _numbers_are_finite(trial: Trial) -> str:
    """Loss and gradient of each step, and all weights at the end. Not a number, a weight would count as changed."""
    empty = [row["step"] for row in trial.run.rows() if row.get("loss") is None or row.get("grad_norm") is None]
    weights = models.load_model(str(trial.run.folder / "model"), "float32", "sdpa")[0].state_dict()
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    return f"steps {empty} have no finite loss or gradient, weights {broken[:3]} are not finite" if empty or broken else ""


def _weights_change(trial: Trial) -> str:
    """All weights are trained: in the last checkpoint, which has all their digits, most must differ from the start."""
    root, checkpoint = trial.run.folder.parent.parent, trial.run.folder / "checkpoints" / trial.run.status["checkpoint"]
    start, end = (models.load_model(str(folder), "float32", "sdpa")[0].state_dict()
                  for folder in (root / "cold-start" / "model", checkpoint))
    moved = torch.cat([(end[name] != value).ravel() for name, value in start.items()])
    share = moved.float().mean().item()
    return "" if share > _LEAST_MOVED else f"{share:.1%} of the weights changed in {STEPS} steps"


def _resumes(trial: Trial) -> str | None:
    if trial.engine == "server":
        return None
    steps = [row["step"] for row in trial.run.rows()]
    if not 0 < trial.killed_at < STEPS:
        return f"the run was killed at step {trial.killed_at} of {STEPS}, so nothing was resumed"
    return "" if steps == list(range(1, STEPS + 1)) else f"after a kill at step {trial.killed_at} the rows are {steps}"


def _engine_agrees(trial: Trial) -> str | None:
    """After each weight sync, vLLM's log-probabilities of what it wrote are those of the trainer."""
    if trial.engine == "none":
        return None
    differences = [row["logp_difference"] for row in trial.run.rows() if row.get("logp_difference") is not None]
    if len(differences) < STEPS:
        return f"vLLM gave log-probabilities to compare in {len(differences)} of {STEPS} steps"
    return "" if (worst := max(differences)) < _LARGEST_DIFFERENCE else (
        f"vLLM's log-probabilities differ from the trainer's by {worst:.3f} a token; does it get the new weights?")


def _memory(trial: Trial) -> str | None:
    """Peak of what torch has allocated, against what `lwz estimate` expects of a GPU that trains."""
    if not torch.cuda.is_available():
        return None
    row = measured(trial)
    peak, expected = row["peak_gib"], row["expected_gib"]
    return "" if peak < expected else f"{peak:.1f} GiB were allocated, and lwz estimate expects {expected:.1f}"


CHECKS: dict[str, Callable[[Trial], str | None]] = {
    "numbers are finite": _numbers_are_finite, "weights change": _weights_change,
    "a killed run goes on": _resumes, "vLLM has the trainer's weights": _engine_agrees,
    "memory is as estimated": _memory}


def measured(trial: Trial) -> dict:
    """Tokens a second, seconds a step, and memory of a trial, in the best of its steps: the first ones compile and load."""
    rows, recipe = trial.run.rows(), trial.run.recipe
    completions = recipe.grpo.group_size * recipe.grpo.queries_per_step
    row = {"engine": trial.engine, "model": recipe.model.name, "step_s": min(row["step_s"] for row in rows),
           "tokens_per_s": round(max(row["completion_tokens"] * completions / row["step_s"] for row in rows), 1)}
    if card := here().gpu:
        plan = make_plan(recipe, card)
        beside = [line for line in writing_memory(plan) if trial.engine == "colocate" and line.name.startswith("vLLM")]
        row |= {"peak_gib": max(row["peak_gib"] for row in rows),
                "expected_gib": round(total(training_memory(plan)) + total(beside), 2)}
    return row
