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

from lwzlib import data, distributed, serving
from lwzlib.recipe import Recipe
from lwzlib.runs import INTERRUPTED, Interrupted, Run, RunError, Stop, end_with, write_atomic

_BASE = ("model", "data", "prompt", "cold_start")  # what every trained weight depends on
_JUDGED = (*_BASE, "writing_rm", "reward")
_DISTILLED = (*_JUDGED, "grpo", "cot")
_PRETRAINED = (*_DISTILLED, "corpus", "pretrain")
_SHARED = {
    "cold-start": _BASE,
    "writing-rm": ("model", "data", "writing_rm"),
    "corpus": ("model", "data", "corpus"),
    "distil": (*_DISTILLED, "corpus"),
    "pack": _PRETRAINED,
    "pretrain": _PRETRAINED,
}
# An arm that changes one of these sections has a shared stage of its own, in its folder; else the arms share it.
_OWN = {
    "cold-start": _BASE,
    "writing-rm": ("writing_rm",),
    "corpus": ("model", "corpus"),
    "distil": ("model", "corpus", "cot"),
    "pack": ("model", "corpus", "cot", "pretrain"),
    "pretrain": (*_BASE, "corpus", "cot", "pretrain"),
}
_OF_ARMS = {
    "samples-before": (*_JUDGED, "samples"),
    "grpo": (*_JUDGED, "grpo"),
    "sft": (*_BASE, "sft"),
    "samples-during": (*_JUDGED, "grpo", "samples", "evaluation"),
    "samples-after": (*_JUDGED, "grpo", "samples"),
}
_SPREAD = ("writing-rm", "pretrain", "sft", "grpo")  # the stages that train at scale; the others are one process
_QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
# glibc gives large blocks back to the system at once; every decoding step then asks for them anew.
# Its OpenMP threads spin while they wait: a short while is enough, and leaves the cores to others.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26),
          "GOMP_SPINCOUNT": "10000"}


def run_folder(recipe: Recipe, seed: int) -> Path:
    """Where a run goes that was given no folder: `runs/<recipe>` of this repository, or `runs/<recipe>-seed<n>`."""
    return Path(__file__).resolve().parent.parent / "runs" / (recipe.name if seed == 0 else f"{recipe.name}-seed{seed}")


def stage_run(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Run:
    """The Run of a stage, shared by the arms or of one of them. Raises RecipeError, DataError or RunError."""
    if stage not in (known := _SHARED | _OF_ARMS):
        raise RunError(f"no stage {stage!r}; stages are {', '.join(known)}")
    own = _own(stage, recipe, arm)
    asked = recipe.for_arm(arm) if own else recipe
    if stage in _SHARED:
        sections, about = _SHARED[stage], {}
    elif stage in arm_stages(recipe, arm):
        sections, about = _sections(stage, asked, arm), asked.arm(arm).model_dump(exclude={"change"})
    else:
        raise RunError(f"arm {arm!r} has no stage {stage!r}; it has {', '.join(arm_stages(recipe, arm))}")
    if own and arm and recipe.arm(arm).change:  # its sections do not say what the arm starts from
        about |= {f"{of or 'shared'}/{other}": stage_run(other, recipe, root, seed, of).fingerprint
                  for other, of in needs(stage, recipe, arm)}
    return Run(Path(root) / (arm if own else "") / stage, asked, seed, sections, _inputs(asked, sections) | about)


def _own(stage: str, recipe: Recipe, arm: str) -> bool:
    """The arm does the stage for itself, in its own folder."""
    changed = {name.split(".")[0] for name in recipe.arm(arm).change} if arm else set()
    return stage in _OF_ARMS or bool(changed & set(_OWN[stage]))


def _sections(stage: str, recipe: Recipe, arm: str) -> tuple[str, ...]:
    """What a stage of an arm depends on: its own sections, and those of what it starts from and learns from."""
    asked = recipe.arm(arm)
    sections = _OF_ARMS[stage] + (_PRETRAINED if asked.start == "continual-pretrain" else ())
    if asked.algorithm == "sft" and stage in ("sft", "samples-after"):
        sections += ("sft",) + (("corpus", *_DISTILLED) if recipe.sft.data == "made" else ())
    return tuple(dict.fromkeys(sections))


def _inputs(recipe: Recipe, sections: tuple[str, ...]) -> dict:
    """Digests of the queries and files that a result depends on, and what the arm changes whose texts are distilled. Raises
    DataError."""
    rm, reward = recipe.writing_rm, recipe.reward
    files = {"model": [recipe.model.name], "writing_rm": [rm.model, rm.pairs, *rm.corpora], "sft": [recipe.sft.data],
             "reward": [reward.writing.model, reward.format.encoder]}  # not corpus.sources: at scale they go once packed
    taught = {f"{name} changes": arm.change for name, arm in recipe.arms.items() if name == recipe.cot.arm and arm.change}
    queries = [query.model_dump(mode="json") for query in data.of_recipe(recipe)]
    return {"queries_digest": recipe.fingerprint("data", queries=queries)} | (taught if "cot" in sections else {}) | {
        f"{path} holds": data.digest_of(full) for section in sections for path in files.get(section, [])
        if path not in ("", "made", "stage") and (full := Path(path).expanduser()).exists()}


def run_stage(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Path:
    """Do the stage here, after the stages it needs; returns its artefact. A finished stage returns at once."""
    from lwzlib import pretrain

    run = stage_run(stage, recipe, root, seed, arm)
    if run.finished and stage != "pack":  # that one looks for damage first
        return run.folder / "model" if (run.folder / "model").is_dir() else run.folder

    def first(other, of=arm):
        return run_stage(other, recipe, root, seed, of)

    def base():
        return str(first("cold-start")) if run.recipe.cold_start.queries else run.recipe.model.name

    if stage == "cold-start":
        return pretrain.cold_start(run.recipe, run)
    if stage == "writing-rm":
        from lwzlib.reward_model import train_rm

        return train_rm(run.recipe, run)
    if stage in ("corpus", "distil", "pack"):
        return _material(stage, run, first)
    if stage == "pretrain":
        return pretrain.pretrain(run.recipe, run, base(), first("corpus"), first("pack"))
    start = str(first("pretrain")) if recipe.arm(arm).start == "continual-pretrain" else base()
    if stage == "sft":
        from lwzlib.sft import train_sft

        return train_sft(run.recipe, run, arm, start, first("distil") if run.recipe.sft.data == "made" else None)
    writing_rm = _writing_rm(run.recipe, first)
    if stage == "grpo":
        from lwzlib.grpo import train_arm

        return train_arm(run.recipe, run, arm, start, writing_rm)
    from lwzlib.generate import samples, samples_during

    if stage == "samples-during":
        return samples_during(run.recipe, run, arm, start, first("grpo").parent, writing_rm)
    return samples(run.recipe, run, arm, start if stage == "samples-before" else
                   str(first(recipe.arm(arm).algorithm)), writing_rm)


def _material(stage: str, run: Run, first) -> Path:
    """The stages that make what continual pretraining reads."""
    if stage == "distil":
        from lwzlib.distil import distil

        return distil(run.recipe, run, str(first("grpo", run.recipe.cot.arm)), _writing_rm(run.recipe, first))
    from lwzlib import packing, shards

    if stage == "corpus":
        return shards.prepare(run.recipe, run)
    return packing.pack(run.recipe, run, first("corpus"), first("distil") if run.recipe.pretrain.cot_token_fraction else None)


def _writing_rm(recipe: Recipe, first) -> str:
    return str(first("writing-rm")) if recipe.reward.weights.writing > 0 and recipe.reward.writing.model == "stage" else ""


def arm_stages(recipe: Recipe, arm: str) -> list[str]:
    """Of one arm, in order; `samples-during` only where the policy is rated while RL goes on (`evaluation.every_steps`)."""
    asked = recipe.for_arm(arm)
    during = asked.arm(arm).algorithm == "grpo" and 0 < asked.evaluation.every_steps < asked.grpo.steps
    return ["samples-before", recipe.arm(arm).algorithm, *["samples-during"] * during, "samples-after"]


def places(recipe: Recipe) -> list[tuple[str, str]]:
    """(arm, or "" where it is shared, stage) of the whole recipe, in an order in which they can be done."""
    found: dict[tuple[str, str], None] = {}

    def add(stage: str, arm: str) -> None:
        place = (arm if _own(stage, recipe, arm) else "", stage)
        if place not in found:
            for other, of in needs(stage, recipe, arm):
                add(other, of)
            found[place] = None

    for name in recipe.arms:
        for stage in arm_stages(recipe, name):
            add(stage, name)
    return list(found)


def needs(stage: str, recipe: Recipe, arm: str = "") -> list[tuple[str, str]]:
    """(stage, arm) that must be finished before, in this order; those have needs of their own."""
    asked = recipe.for_arm(arm) if arm else recipe
    base = [("cold-start", arm)] if asked.cold_start.queries else []
    judge = [("writing-rm", arm)] if _writing_rm(asked, lambda stage: stage) else []
    material = {"distil": [("grpo", asked.cot.arm), *judge], "pretrain": [*base, ("corpus", arm), ("pack", arm)],
                "pack": [("corpus", arm), *[("distil", arm)] * (asked.pretrain.cot_token_fraction > 0)]}
    if stage in _SHARED:
        return material.get(stage, [])
    start = [("pretrain", arm)] if recipe.arm(arm).start == "continual-pretrain" else base
    if stage == "sft":
        return start + [("distil", arm)] * (asked.sft.data == "made")
    return [(recipe.arm(arm).algorithm, arm)] * (stage in ("samples-during", "samples-after")) + start + judge


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
            before, env = around.enter_context(serving.ready(stage, recipe, run.folder, start[0])) if spread else ([], {})
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
    return [sys.executable, "-m", "lwzlib.cli", "stage", stage, str((folder / "asked.yaml").resolve()), "--run-dir",
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
    failed = distributed.failure(run.folder / "logs")
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


def end_with_parent() -> None:
    """In a launched process: leave when the parent is gone, so that a killed notebook leaves nothing running; save and stop
    when asked to."""
    Stop.listen()
    if parent := int(os.environ.get("LWZ_END_WITH", "0")):
        end_with(parent)
