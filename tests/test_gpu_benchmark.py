"""The GPU benchmark in small on this machine: its rows are whole, and what is measured is not measured again."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import read_rows

ROOT = Path(__file__).parent.parent


def bench(*words: str, **more: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh"), *words], capture_output=True, text=True, env=env,
                          timeout=600)


def test_a_dry_run_measures_everything_once(smoke, tmp_path):
    done = bench("dry", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "gpu.csv", keep_default_na=False)
    counts = table.groupby(["measure", "trainer", "arm", "max_new_tokens"]).size()
    assert set(counts) == {2} and len(counts) == 2 * 2 + 4 + 2
    assert set(table[table.measure == "run"].arm) == {"base-nothink", "base-think"}
    assert (table.step_s > table.write_s + table.reward_s).all() and (table.update_s > 0).all()
    assert (table.peak_gib > 0).all() and (table.tokens_per_s > 0).all() and table.commit.str.len().eq(40).all()
    forced = table[table.measure != "run"]
    assert (forced.mean_tokens == forced.max_new_tokens).all()
    assert {"hardware", "versions", "fingerprint", "seed", "model"} <= set(table)
    before = (tmp_path / "gpu.csv").read_bytes()
    again = bench("dry", str(tmp_path))
    assert again.returncode == 0 and again.stdout.count("already in") == 10
    assert (tmp_path / "gpu.csv").read_bytes() == before


def test_a_run_that_was_stopped_goes_on_after_its_last_step(smoke, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    made = load_recipe("smoke", gpu.COMMON | gpu.DRY["sets"] | {"grpo.sampling.max_new_tokens": 8, "grpo.steps": 3})
    begin = gpu.Parts.on_step_begin

    def stop_in_the_third(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gpu.Parts, "on_step_begin", stop_in_the_third)
        gpu.run_of(made, tmp_path / "runs", "base-think")
    before = read_rows(tmp_path / "runs" / "base-think" / "grpo" / "parts.jsonl")
    rows = gpu.run_of(made, tmp_path / "runs", "base-think")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[:2] == before
    assert gpu.run_of(made, tmp_path / "runs", "base-think") == rows, "a finished run is measured again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured():
    done = bench("run")
    assert done.returncode == 2 and "no CUDA GPU here" in done.stderr


def test_a_bare_machine_is_told_what_it_lacks_before_anything_is_measured(tmp_path):
    for name in ("bash", "dirname", "grep"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name, text in (("python3", "echo /nowhere"), ("nvidia-smi", "echo GPU 0: A card; echo GPU 1: A card")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = bench("run", PATH=str(tmp_path), CC="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    lacks = ("no git: ", "no C compiler, ", "no /nowhere/Python.h, ", "2 GPUs are visible, ")
    assert len(lines) == 4 and all(line.startswith(f"gpu.sh: {what}") for line, what in zip(lines, lacks, strict=True))


def test_the_bundle_leaves_torch_to_the_gpu_machine():
    done = subprocess.run(["python", str(ROOT / "benchmarks" / "closure.py"), "trl", "peft"], capture_output=True, text=True)
    names = {line.split("==")[0] for line in done.stdout.split()}
    assert {"trl", "peft", "transformers", "tokenizers", "safetensors", "pyyaml"} <= names
    assert not {"torch", "triton"} & names
