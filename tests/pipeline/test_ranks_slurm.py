"""GRPO over two nodes of a real Slurm: inside an allocation, and as the notebook that the engine sends there."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import slurm_cluster
import smoke_runs
from polling import until
from slurm_jobs import Site, nothing_left
from smoke_runs import ARM, COMMON, same, start

from lwzlib.base.recipe import load_recipe
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


def world(code: str) -> subprocess.CompletedProcess:
    """`code` inside an allocation of two nodes with two GPUs each, with `at` as its world of four ranks."""
    code = "import os, subprocess, sys; from pathlib import Path; from lwzlib.pipeline import ranks; at = ranks.World(" \
           f"ranks.allocated(), 2, ranks.job_port(os.environ['SLURM_JOB_ID']), slurm=True)\n{code}"
    return subprocess.run(["salloc", "-Q", "-N2", "--ntasks-per-node=1", "--cpus-per-task=4", "--gpus-per-node=2",
                           sys.executable, "-c", code], capture_output=True, text=True, timeout=90)


def test_ranks_know_who_they_are_and_see_every_gpu_of_their_node(slurm, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "VLLM_HOST_IP", "GLOO_SOCKET_IFNAME",
             "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    shown = f"import os; print(os.uname().nodename, *[os.environ[name] for name in {names}])"
    done = world(f"command, env = ranks.in_every_rank(ranks.meet(at), [sys.executable, '-c', {shown!r}], "
                 f"Path({str(tmp_path)!r}))\nsys.exit(subprocess.run(command, env=os.environ | env).returncode)")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank-00{rank}.log").read_text() for rank in range(4)] == [
        f"{node} {2 * number + local} {local} 4 2 {slurm.net}.11 {slurm.net}.{11 + number} eth0 0,1 2\n"
        for number, node in enumerate(slurm_cluster.NODES) for local in range(2)]


def test_a_node_that_cannot_be_reached_is_named(slurm):
    """The second node answers Slurm, and has no way to the first."""
    way = ["-n", slurm._namespace("node2"), "route"]
    slurm_cluster._ip(*way, "add", "prohibit", f"{slurm.net}.11/32")
    try:
        done = world("ranks._MEET_S = 5; ranks.meet(at)")
    finally:
        slurm_cluster._ip(*way, "delete", "prohibit", f"{slurm.net}.11/32")
    assert "RunError: of 2 nodes, node2 did not reach node1:" in done.stderr, done.stderr
    assert "node2 cannot reach the head node at node1:" in done.stderr


_VLLM = """
import http.server, os, sys
print("at", os.environ["VLLM_HOST_IP"], "through", os.environ["GLOO_SOCKET_IFNAME"], flush=True)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
http.server.HTTPServer((host, int(port)), Health).serve_forever()
"""


def test_a_server_on_another_node_listens_where_the_others_reach_it(slurm, program, tmp_path):
    """A program stands in vLLM's place."""
    program("vllm", _VLLM)
    done = world("import dataclasses; from lwzlib.base.recipe import load_recipe; from lwzlib.pipeline import vllm_servers\n"
                 "at = ranks.meet(dataclasses.replace(at, hosts=at.hosts[:1], servers=at.hosts[1:]))\n"
                 f"with vllm_servers.serve(load_recipe('paper', 'distributed.start_s=20'), at, Path({str(tmp_path)!r}), "
                 "'m', 9):\n    pass")
    assert done.returncode == 0, done.stderr
    assert f"vLLM answers at http://{slurm.net}.12:" in done.stdout
    assert (tmp_path / "vllm-trains-node2.log").read_text().startswith(f"at {slurm.net}.12 through eth0\n")


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
    started.result(400)
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


def test_an_interrupt_inside_a_job_saves_first(smoke, slurm, tmp_path):
    parent, run = allocated(tmp_path, ["grpo.steps=100000", "grpo.checkpoint_every_steps=100000"])
    until(lambda: run.status.get("step", 0) >= 2, "step 2", 120)
    notebook, = psutil.Process(parent.pid).children()
    notebook.send_signal(signal.SIGINT)
    said = parent.communicate(timeout=90)[0]
    assert "KeyboardInterrupt" in said and run.status["state"] == "interrupted", said[-3000:]
    assert run.status["checkpoint_step"] >= 2 and len(run.rows()) == run.status["checkpoint_step"]


def test_ranks_end_with_a_killed_notebook(smoke, slurm, tmp_path):
    parent, run = allocated(tmp_path, ["grpo.steps=100000"])
    until(lambda: run.status.get("step", 0) >= 1, "step 1", 120)
    notebook, = psutil.Process(parent.pid).children()
    notebook.kill()
    parent.communicate(timeout=60)
    until(lambda: not any(ranks(slurm).values()), "the end of the ranks", 30)
