"""The GPU benchmark in small on this machine: its rows are whole, and what is measured is not measured again."""

import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parent.parent


def bench(*words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured():
    done = bench("run")
    assert done.returncode == 2 and "no CUDA GPU here" in done.stderr


def test_the_bundle_leaves_torch_to_the_gpu_machine():
    done = subprocess.run(["python", str(ROOT / "benchmarks" / "closure.py"), "trl", "peft"], capture_output=True, text=True)
    names = {line.split("==")[0] for line in done.stdout.split()}
    assert {"trl", "peft", "transformers", "tokenizers", "safetensors", "pyyaml"} <= names
    assert not {"torch", "triton"} & names
