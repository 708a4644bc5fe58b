"""`lwz check gpu` on this machine: what it runs here, what it skips, and that it finds what is wrong."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lwzlib.base.rows import read_rows, write_rows
from lwzlib.base.run_folder import Run
from lwzlib.cli.main import app
from lwzlib.cluster import gpu_check
from lwzlib.cluster.gpu_check import CHECKS, STEPS, Trial


@pytest.fixture(scope="module")
def checked(smoke, tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    return folder, CliRunner().invoke(app, ["check", "gpu", "--model", "kit:tiny", "--folder", str(folder)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_runs_what_can_be_run_and_says_what_it_skips(checked):
    folder, done = checked
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "PASS"
    for line in ("ok       vllm.mode none: numbers are finite", "ok       vllm.mode none: weights change",
                 "ok       vllm.mode none: a killed run goes on",
                 "skipped  vllm.mode none: memory is as estimated", "skipped  vllm.mode colocate: there is no CUDA GPU",
                 "skipped  vllm.mode server: there is no CUDA GPU"):
        assert line in done.output.splitlines()
    (row,) = read_rows(folder / "check.jsonl")
    assert row["tokens_per_s"] > 0 and row["engine"] == "none" and row["hardware"] and row["commit"]
    (run,) = folder.glob("none-*")
    assert [row["step"] for row in read_rows(run / "base-think" / "grpo" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.fixture
def trial(checked, tmp_path):
    """A copy of what the check left, with its engine and the step at which it was killed."""
    (run,) = checked[0].glob("none-*")
    shutil.copytree(run, tmp_path / "run")
    made = {engine: gpu_check._recipe("kit:tiny", engine) for engine in ("none", "colocate", "server")}
    copy = Run(tmp_path / "run" / "base-think" / "grpo", made["none"], 0, ("model", "grpo"))
    return lambda engine="none", killed_at=2: Trial(dataclasses.replace(copy, recipe=made[engine]), engine, killed_at)


def test_weights_that_stay_are_wrong(trial):
    assert CHECKS["weights change"](trial()) == ""
    folder = trial().run.folder
    checkpoint = folder / "checkpoints" / trial().run.status["checkpoint"]
    shutil.copytree(folder.parent.parent / "cold-start" / "model", checkpoint, dirs_exist_ok=True)
    assert CHECKS["weights change"](trial()) == f"0.0% of the weights changed in {STEPS} steps"


def test_what_is_no_number_is_wrong(trial):
    finite, folder = CHECKS["numbers are finite"], trial().run.folder
    assert finite(trial()) == ""
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    write_rows(folder / "metrics.jsonl", [row | {"loss": None} if row["step"] == 3 else row for row in trial().run.rows()])
    assert finite(trial()) == "steps [3] have no finite loss or gradient, weights ['model.norm.weight'] are not finite"


def test_a_run_that_was_not_resumed_is_wrong(trial):
    resumes = CHECKS["a killed run goes on"]
    assert resumes(trial()) == "" and "killed at step 4 of 4" in resumes(trial(killed_at=4))
    write_rows(trial().run.folder / "metrics.jsonl", trial().run.rows()[:2] + trial().run.rows()[1:])
    assert resumes(trial()) == "after a kill at step 2 the rows are [1, 2, 2, 3, 4]"


def test_an_engine_with_old_weights_is_wrong(trial):
    agrees, rows = CHECKS["vLLM has the trainer's weights"], trial().run.rows()
    assert agrees(trial()) is None, "without vLLM nothing can differ"
    for difference, problem in ((0.02, ""), (1.4, "differ from the trainer's by 1.400 a token")):
        write_rows(trial().run.folder / "metrics.jsonl", [row | {"logp_difference": difference} for row in rows])
        assert problem in agrees(trial("colocate")) and bool(problem) == bool(agrees(trial("colocate")))


def test_memory_beyond_the_estimate_is_wrong(trial, monkeypatch):
    class Card:
        name, total_memory = "a card", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    write_rows(trial().run.folder / "metrics.jsonl", [row | {"peak_gib": 20.0} for row in trial().run.rows()])
    assert CHECKS["memory is as estimated"](trial("colocate")) == "", "0.3 of the card is vLLM's, in the same process"
    for peak, problem in ((0.1, ""), (70.0, "70.0 GiB were allocated, and lwz estimate expects 0.5")):
        write_rows(trial().run.folder / "metrics.jsonl", [row | {"peak_gib": peak} for row in trial().run.rows()])
        assert CHECKS["memory is as estimated"](trial()) == problem


def test_a_server_is_tried_where_there_are_two_nodes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: name)
    assert dict(gpu_check.engines()) == {"none": "", "colocate": "", "server": "a server wants a Slurm allocation of two nodes"}
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert dict(gpu_check.engines())["server"] == ""
    made = gpu_check._recipe("kit:tiny", "server")
    assert (made.launch, made.vllm.nodes, json.loads(made.model_dump_json())["vllm"]["mode"]) == ("slurm", 1, "server")
