"""GRPO over two nodes of a real Slurm: inside an allocation, and as the notebook that the engine sends there."""

import contextlib
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import slurm_cluster
import smoke_runs
from polling import until
from slurm_jobs import Site, nothing_left
from smoke_runs import ARM, COMMON, same, start

from lwzlib.base.recipe import load_recipe
from lwzlib.pipeline.ranks import failure
from lwzlib.pipeline.stages import stage_run

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TWO_NODES = ["launch=slurm", "distributed.nodes=2", "grpo.micro_batch_completions=2"]


@pytest.fixture(autouse=True)
def _one_thread_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
        nothing_left(cluster.folder)


def ranks(slurm) -> dict[str, list[psutil.Process]]:
    """On each node, the processes that train."""
    found = {node: [] for node in slurm_cluster.NODES}
    for node in found:
        for pid in slurm.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found[node] += [process] * ("RANK" in process.environ() and "stage" in process.cmdline())
    return found


def allocated(folder: Path, *overrides) -> subprocess.Popen:
    """`launch` inside an allocation of two nodes."""
    return start(folder, TWO_NODES, *overrides, inside=["salloc", "-Q", "-N2", "--ntasks-per-node=1"])


def test_two_nodes_learn_what_one_process_learns(alone, rowwise, slurm, tmp_path):
    parent, run = allocated(tmp_path)
    said = parent.communicate(timeout=150)[0]
    assert parent.returncode == 0, said[-3000:]
    same(run, alone)


def test_the_engine_sends_notebook_05_to_two_nodes_and_they_learn_what_one_process_learns(alone, slurm, tmp_path):
    inside, image, container = tmp_path / "inside", tmp_path / "image", tmp_path / "container"
    for folder in (inside, image):
        folder.mkdir()
    (image / "mark").touch()
    container.write_text(f'#!/bin/sh\nmount --bind {image} {inside} && exec "$@"\n')
    container.chmod(0o755)
    site = Site(tmp_path, cpus_per_node=2, memory_gb_per_node=8, poll_s=1, container=f"unshare --mount {container}",
                environment={"PYTHONPATH": smoke_runs.ROWWISE, "OMP_NUM_THREADS": "1"})
    asked = {"recipe": "smoke", "overrides": [*COMMON, *TWO_NODES], "arm": ARM, "run_dir": str(tmp_path / "run")}
    started = site.started(NOTEBOOKS / "05_train_grpo.ipynb", "nodes=2", **asked)
    found = until(lambda: started.done() or (all((on := ranks(slurm)).values()) and on), "a rank on each node", 120)
    assert not started.done(), started.exception()
    assert all(Path(f"/proc/{rank.pid}/root{inside}/mark").exists() for on in found.values() for rank in on) and not any(
        inside.iterdir()), "a rank is outside of the container"
    started.result(120)
    run = stage_run("grpo", load_recipe("smoke", asked["overrides"]), tmp_path / "run", 0, ARM)
    same(run, alone)
    logs = [(run.folder / "logs" / f"rank-{rank:03}.log").read_text() for rank in range(2)]
    assert "step 4/4" in logs[0] and "step 4/4" not in logs[1]
    assert len(site.jobs()) == 1 and site.jobs()[0].report["state"] == "finished"


def test_a_rank_that_dies_on_another_node_ends_the_job_and_is_named(smoke, slurm, tmp_path):
    parent, run = allocated(tmp_path, ["grpo.steps=100000"])
    until(lambda: run.status.get("step", 0) >= 1, "step 1", 120)
    (first,), (second,) = ranks(slurm).values()
    second.kill()
    said = parent.communicate(timeout=90)[0]
    assert "RunError: the stage ended" in said and "rank 1 of 2 on node2 ended first, by signal 9" in said, said[-3000:]
    assert run.status["state"] == "failed" and not first.is_running()
    assert not (run.folder / "logs" / "failed-0.json").exists() or "rank 1 of 2" in failure(run.folder / "logs")


def test_an_interrupt_inside_a_job_saves_first(smoke, slurm, tmp_path):
    parent, run = allocated(tmp_path, ["grpo.steps=100000", "grpo.checkpoint_every_steps=100000"])
    until(lambda: run.status.get("step", 0) >= 2, "step 2", 120)
    notebook, = psutil.Process(parent.pid).children()
    notebook.send_signal(signal.SIGINT)
    said = parent.communicate(timeout=90)[0]
    assert "KeyboardInterrupt" in said and run.status["state"] == "interrupted", said[-3000:]
    assert run.status["checkpoint_step"] >= 2 and len(run.rows()) == run.status["checkpoint_step"]
