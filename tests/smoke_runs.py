"""GRPO of the smoke recipe, in one process or many, and what must be the same in both."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lwzlib.base.recipe import load_recipe
from lwzlib.base.run_folder import Run
from lwzlib.pipeline.launch import launch
from lwzlib.pipeline.stages import stage_run

ARM = "base-think"
# 120 tokens: of a random model so many hold tags, and so rewards that differ
COMMON = ["reward.weights.writing=0.0", "grpo.sampling.max_new_tokens=120", "cold_start.queries=0"]
# Sampling that does not depend on the number of processes, in the processes that a test starts; the kit itself is unchanged.
ROWWISE = f"{Path(__file__).parent / 'rowwise'}:{Path(__file__).parent.parent}"


def weights(run: Run) -> dict:
    return load_file(run.folder / "model" / "model.safetensors")


def comparable(rows):
    return [{key: value for key, value in row.items() if key != "step_s"} for row in rows]


def trained(folder: Path, *overrides) -> Run:
    return launch("grpo", load_recipe("smoke", COMMON, *overrides), folder, 0, ARM)


def start(folder: Path, *overrides, inside=()) -> tuple[subprocess.Popen, Run]:
    made = load_recipe("smoke", COMMON, *overrides)
    run = stage_run("grpo", made, folder, 0, ARM)
    code = f"from lwzlib.base.recipe import Recipe; from lwzlib.pipeline.launch import launch; " \
           f"launch('grpo', Recipe.model_validate_json(" \
           f"{made.model_dump_json()!r}), {str(folder)!r}, 0, {ARM!r})"
    command = [*inside, sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), run


def same(run: Run, alone: Run) -> None:
    assert [row["completion"] for row in run.rows("completions")] == [row["completion"] for row in alone.rows("completions")]
    for ours, theirs in zip(run.rows(), alone.rows(), strict=True):
        for name in ("loss", "grad_norm", "length", "format", "advantage_std", "answer_tokens", "truncated"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    ours, theirs = weights(run), weights(alone)
    assert set(ours) == set(theirs)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 2e-6
