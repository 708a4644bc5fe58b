"""Fixtures: the smoke recipe with its model made; tests marked gpu are skipped, visibly, without one."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # tests start processes beside their own
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core

import fake_llm_server
import pytest
import smoke_runs
from safetensors.torch import load_file

from lwzlib.base import models
from lwzlib.base.kit import TINY, prepare
from lwzlib.base.recipe import load_recipe
from lwzlib.pipeline.stages import run_stage

_LONGEST = ("test_models", "test_notebooks", "test_vllm", "test_serve_rm")  # first: at the end the other worker would wait

# A shell's background job ignores Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smoke():
    prepare(TINY)
    return load_recipe("smoke")


@pytest.fixture(scope="session")
def smoke_rm(smoke, tmp_path_factory):
    """A run folder in which the smoke recipe's Writing RM is trained."""
    root = tmp_path_factory.mktemp("writing-rm")
    run_stage("writing-rm", smoke, root, 0)
    return root


@pytest.fixture
def rowwise(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", smoke_runs.ROWWISE)


@pytest.fixture(scope="session")
def alone(smoke, tmp_path_factory):
    """GRPO of one process, rowwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", smoke_runs.ROWWISE)
        patch.setenv("OMP_NUM_THREADS", "1")
        run = smoke_runs.trained(tmp_path_factory.mktemp("alone"), ["launch=subprocess"])
    start = load_file(Path(models.resolve(TINY)) / "model.safetensors")
    moved = max((value - start[name]).abs().max().item() for name, value in smoke_runs.weights(run).items())
    assert moved > 1e-3, "nothing was learnt, so nothing can be compared"
    return run


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a Python program first on PATH, in the place of one that this machine lacks."""
    def put(name, text):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    return put


@pytest.fixture(scope="session")
def llm_server(tmp_path_factory):
    with fake_llm_server.running(tmp_path_factory.mktemp("llm-server")) as server:
        yield server


def pytest_make_parametrize_id(val, argname):
    """Bytes stay out of tests' names: those of an archive hold the time, and two workers then collect other tests."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items):
    import torch

    # Files that wait for Slurm alternate with files that compute, so that two workers do both at a time.
    files = list(dict.fromkeys(item.module for item in items))
    waiting = [file for file in files if hasattr(file, "slurm_cluster")]
    computing = sorted((file for file in files if file not in waiting), key=lambda file: file.__name__ not in _LONGEST)
    place = {file: 2 * i for i, file in enumerate(waiting)} | {file: 2 * i + 1 for i, file in enumerate(computing)}
    items.sort(key=lambda item: place[item.module])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and this machine has none"))
