"""What a recipe needs of a machine, told in one line: each check on machines that are made up, the commands on this one."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from typer.testing import CliRunner

from lwzlib.base import kit, models
from lwzlib.base.kit import TINY
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError
from lwzlib.cli import main
from lwzlib.cluster import readiness
from lwzlib.cluster.estimate import GPUS
from lwzlib.cluster.readiness import CHECKS, Place, check_stage, here, reasons
from lwzlib.pipeline import vllm_servers

CPU, ONE, TWO = Place(0, None), Place(1, GPUS["h100"]), Place(2, GPUS["h100"])
SMALL = Place(1, GPUS["h100"]._replace(gib=6))
SPREAD = "launch=torchrun distributed.processes=4"


def lwz(*words):
    return CliRunner().invoke(main.app, words, env={"COLUMNS": "200"})


@pytest.mark.parametrize(("recipe", "sets", "place", "reason"), [
    ("nano", "", CPU, None),
    ("nano", SPREAD, CPU, None),  # ranks on a CPU are legal
    ("nano", "model.attention=flash_attention_2", CPU, "no CUDA GPU, and model.attention = flash_attention_2 wants one"),
    ("gpu", "", CPU, "no CUDA GPU, and vllm.mode = colocate wants one"),
    ("gpu", "", ONE, ""),
    ("gpu", "", TWO, "launch: subprocess is one process and sees 2 GPUs, which TRL refuses: set CUDA_VISIBLE_DEVICES=0"),
    ("gpu", "launch=torchrun", TWO, ""),
    ("gpu", SPREAD, TWO, "it wants 4 processes a node, and 2 GPUs are visible"),
    ("gpu", SPREAD, TWO._replace(spreads=False), ""),  # a stage that is one process
])
def test_gpus(recipe, sets, place, reason):
    found = CHECKS["GPUs"](load_recipe(recipe, sets), place)
    assert found is None if reason is None else found.startswith(reason) and bool(found) == bool(reason)


def test_memory_is_that_of_the_estimate_and_is_told_where_the_card_is_known():
    gpu = load_recipe("gpu")
    assert CHECKS["memory"](gpu, ONE) == "" and CHECKS["memory"](gpu, CPU) is None
    assert "a GPU that trains needs" in CHECKS["memory"](gpu, SMALL)
    assert CHECKS["memory"](load_recipe("gpu", "model.name=someone/model"), ONE) is None


def test_a_stage_that_is_due_needs_its_own_memory_alone():
    gpu = load_recipe("gpu", "writing_rm.batch_pairs=32")  # 64 texts of 16,000 tokens
    reason = CHECKS["memory"](gpu, ONE._replace(stage="writing-rm"))
    assert reason == CHECKS["memory"](gpu, ONE) and reason.startswith("writing-rm: a GPU that trains needs")
    assert CHECKS["memory"](gpu, ONE._replace(stage="grpo")) == ""
    assert CHECKS["memory"](gpu, ONE._replace(stage="samples-before")) is None


def test_the_card_of_this_machine_is_asked_for_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="T4", total_memory=15 * 2**30))
    assert here()[:1] == (2,) and (here().gpu.name, here().gpu.gib) == ("T4", 15)


def test_packages_are_named_that_are_not_installed(monkeypatch, program):
    monkeypatch.setattr(readiness, "find_spec", lambda name: name == "peft")
    look = CHECKS["packages"]
    assert look(load_recipe("smoke"), CPU) is None and look(load_recipe("nano"), CPU) == ""
    assert look(load_recipe("paper"), CPU).startswith("not installed: vllm, deepspeed: pip install -e '.[gpu]'")
    monkeypatch.setattr(readiness, "find_spec", lambda name: True)
    monkeypatch.setenv("PATH", "")
    assert look(load_recipe("gpu"), CPU).startswith("the program vllm is neither on PATH nor in /")
    program("vllm", "")
    assert look(load_recipe("gpu"), CPU) == ""


def test_vllm_is_found_beside_this_python_where_its_folder_is_not_on_path(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_servers.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert vllm_servers.program() == "vllm"
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    assert vllm_servers.program() == str(tmp_path / "vllm")


@pytest.mark.parametrize("sets", [
    {"model.name": "{tmp}/other"}, {"model.name": "/models/of/the/nodes"},
    {"grpo.lora.rank": 4, "grpo.lora.targets": ["q_proj", "lm_head"]}])
def test_memory_that_cannot_be_computed_is_no_reason(sets, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"text_config": {"hidden_size": 8}}')
    sets = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in sets.items()}
    assert CHECKS["memory"](load_recipe("gpu", sets), ONE) is None


def test_a_tokenizer_that_only_the_nodes_have_is_no_reason():
    made = load_recipe("nano", {"model.name": "/models/of/the/nodes", "writing_rm.model": "/models/of/the/nodes"})
    assert "does not exist" in CHECKS["tokenizer"](made, CPU) and CHECKS["tokenizer"](made, CPU._replace(here=False)) is None
    unused = load_recipe("nano", {"writing_rm.model": "/models/of/the/nodes", "reward.weights.writing": 0.0})
    assert CHECKS["tokenizer"](unused, CPU) == "", "no Writing RM is trained"


def test_too_little_memory_is_a_warning_to_a_stage(monkeypatch, capsys):
    """The estimate is from above: what it has no room for may fit."""
    monkeypatch.setattr(readiness, "here", lambda spreads=True: SMALL)
    monkeypatch.setattr(readiness, "_compiler", lambda *_: "")
    check_stage("writing-rm", load_recipe("nano"))
    assert "memory may not suffice, `lwz estimate` says: writing-rm: a GPU that trains needs" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and may have flash attention")
def test_an_attention_is_asked_of_transformers_here_and_of_the_packages_elsewhere(monkeypatch):
    look, flash = CHECKS["attention"], load_recipe("paper")
    assert look(load_recipe("nano"), CPU) == ""
    assert "FlashAttention2 has been toggled on, but it cannot be used" in look(flash, ONE), "transformers' own word"
    there = ONE._replace(here=False)
    assert "neither kernels nor flash-attn is installed. It needs a CUDA GPU and the package `kernels`" in look(flash, there)
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: True)
    assert look(flash, there) == ""


@pytest.fixture
def folder(smoke, tmp_path):
    """A copy of kit:tiny, to change."""
    return shutil.copytree(models.resolve(TINY), tmp_path / "copy")


def test_a_tokenizer_has_an_end_and_the_template_of_its_frame(folder, monkeypatch):
    def look(frame, name=folder):
        return CHECKS["tokenizer"](load_recipe("smoke", {"model.name": str(name), "model.frame": frame}), CPU)

    assert look("chat") == ""
    (folder / "chat_template.jinja").unlink()
    assert look("plain") == "" and "has no chat template: give model.frame=plain" in look("chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert "has no end of text (eos_token)" in look("plain")
    assert "does not exist" in look("plain", "/no/such/folder")
    assert look("plain", "someone/model").startswith("someone/model is not in the hub's cache on this machine, and HF_HUB")
    monkeypatch.setenv("LWZ_CACHE", str(folder))
    assert "run `lwz prepare`" in look("chat", kit.SMOLLM2)


def test_triton_wants_a_compiler_and_the_header_of_python(monkeypatch, program, tmp_path):
    look, recipe = CHECKS["C compiler"], load_recipe("gpu")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(readiness.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    program("gcc", "")
    assert look(recipe, CPU) is None and look(recipe, ONE._replace(here=False)) is None
    assert look(recipe, ONE) == f"Triton wants Python.h, and there is no {tmp_path / 'Python.h'}: apt-get install python3-dev"
    (tmp_path / "Python.h").touch()
    assert look(recipe, ONE) == ""
    monkeypatch.setenv("PATH", "")
    assert look(recipe, ONE).startswith("Triton wants a C compiler, and there is no gcc or clang")


def test_slurm_and_git_are_looked_for(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert CHECKS["Slurm"](load_recipe("paper"), CPU).startswith("no srun, scontrol: start from a login node")
    assert CHECKS["Slurm"](load_recipe("paper"), CPU._replace(here=False)).startswith("no sbatch, srun")
    assert CHECKS["Slurm"](load_recipe("gpu"), CPU) is None
    done = lwz("doctor", "smoke")
    assert "git is not installed" in done.output and done.output.endswith("recipe smoke can run here\n") and not done.exit_code


@pytest.mark.parametrize("name", ["smoke", "nano"])
def test_a_machine_that_can_run_a_recipe_is_told_so_in_the_last_line(smoke, name):
    kit.prepare(load_recipe(name).model.name)
    done = lwz("doctor", name)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == f"recipe {name} can run here"
    assert all(check in done.output for check in CHECKS)


def test_a_machine_that_cannot_is_told_all_reasons_in_the_last_line(monkeypatch):
    monkeypatch.setattr(readiness, "here", lambda: SMALL)
    monkeypatch.setattr(readiness, "find_spec", lambda name: False)
    done = lwz("doctor", "gpu", "-s", "grpo.kl_beta=0.1")
    assert done.exit_code == 1
    last = done.output.splitlines()[-1]
    assert last.startswith("recipe gpu cannot run here: not installed: vllm: pip")
    assert "; cold-start: a GPU that trains needs" in last and "; grpo: a GPU that trains needs" in last


def test_a_recipe_for_slurm_is_held_against_the_profile_until_a_job_runs(monkeypatch):
    monkeypatch.setenv("LWZ_PROFILE", "generic nodes=2 gpus_per_node=4 gpu=a100")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    paper = load_recipe("paper")
    assert readiness.place_of(paper) == Place(4, GPUS["a100"], 2, here=False)
    assert reasons(paper, readiness.place_of(paper), ["GPUs"]) == [
        "it wants 8 nodes, and the profile gives nodes=2: change either"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert readiness.place_of(paper).here


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_stage_looks_before_it_loads_a_weight(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "end_with_parent", lambda: None)
    monkeypatch.setattr(models, "load_model", lambda *args, **more: pytest.fail("a weight was loaded"))
    stage = ("stage", "grpo", "smoke", "--arm", "base-think", "--run-dir", str(tmp_path), "-s", "cold_start.queries=0",
             "-s", "reward.weights.writing=0.0")
    done = lwz(*stage, "-s", "vllm.mode=colocate", "-s", "launch=subprocess")
    assert isinstance(done.exception, RunError)
    assert str(done.exception).startswith("recipe smoke cannot run here: not installed: vllm")
    assert "no CUDA GPU, and vllm.mode = colocate wants one" in str(done.exception) and not os.listdir(tmp_path)
    check_stage("corpus", load_recipe("gpu"))  # needs no model
    check_stage("grpo", load_recipe("smoke"))


def test_a_finished_stage_is_loaded_on_any_machine(smoke_rm, monkeypatch):
    monkeypatch.setattr(main, "end_with_parent", lambda: None)
    monkeypatch.setattr(readiness, "check_stage", lambda *_: pytest.fail("nothing is left to do"))
    assert lwz("stage", "writing-rm", "smoke", "--run-dir", str(smoke_rm)).exit_code == 0
