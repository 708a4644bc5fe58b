"""What goes wrong on a cluster, done to a real one: each end is told as it was, and what can go on goes on."""

import os
import signal
import subprocess
import time

import psutil
import pytest
import slurm_cluster
from polling import until
from slurm_jobs import STEPS, Site, error_of, nothing_left, printed, statuses

from lwzlib.cluster import jobs
from lwzlib.cluster.jobs import ask_slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def site(cluster, tmp_path):
    until(lambda: slurm_cluster.idle() == set(slurm_cluster.NODES), "two idle nodes", 90)
    yield Site(tmp_path)
    subprocess.run(["scancel", "--user", "root"], check=True)  # what a failed test left
    nothing_left(cluster.folder)


WAITS = "import time\nprint('here', flush=True)\ntime.sleep(600)"


def scancel(job, *words):
    subprocess.run(["scancel", *words, job.record["job_id"]], check=True)


def shown(site):
    """The state in `lwz jobs`."""
    return jobs.summary(site.jobs()[-1])["state"]


def head_of(job):
    return psutil.Process(job.report["pid"])


def waiting(site):
    """The job, once its cell waits."""
    until(lambda: site.shown(1), "the first line of the cell", 90)
    return site.running()


def test_a_cancelled_job_says_so(site):
    started = site.started(site.notebook(WAITS, "print('never')"))
    scancel(waiting(site))
    error = error_of(started)
    assert error.ename == "JobCancelled" and "was cancelled" in error.evalue and shown(site) == "cancelled"
    assert statuses(site.cells()) == ["completed", "failed", "pending"]


def test_a_killed_worker_says_so_and_its_kernel_ends(site):
    started = site.started(site.notebook(WAITS, "print('never')"))
    job = waiting(site)
    kernel = head_of(job).children()[0]
    head_of(job).kill()
    error = error_of(started)
    assert error.ename == "JobKilled" and "exit code and signal 0:9" in error.evalue and shown(site) == "failed"
    assert statuses(site.cells()) == ["completed", "failed", "pending"]
    until(lambda: not kernel.is_running(), "the end of the kernel", 20)


def test_a_killed_kernel_says_so(site):
    started = site.started(site.notebook(WAITS, "print('never')"))
    head_of(waiting(site)).children()[0].kill()
    error = error_of(started)
    assert error.ename == "JobKilled" and "Kernel died" in error.evalue
    assert statuses(site.cells()) == ["completed", "failed", "pending"]


def test_too_much_memory_says_so(site):
    notebook = site.notebook("x = bytearray(3 * 2**30)\nimport time\ntime.sleep(60)")
    error = error_of(site.started(notebook, "memory_gb_per_node=1"))
    assert error.ename == "JobOutOfMemory" and "1 GB were asked for on each node" in error.evalue
    assert shown(site) == "out_of_memory"


@pytest.mark.parametrize(("requeues", "end"), [(0, "JobTimedOut"), (1, None)])
def test_before_the_time_limit_the_cell_is_interrupted_and_the_job_starts_again(site, tmp_path, requeues, end):
    notebook = site.notebook(STEPS.format(path=str(tmp_path / "steps"), steps=150, pause=0.1), "print('the last cell')")
    started = site.started(notebook, f"requeues={requeues}")
    job = waiting(site)
    scancel(job, "--batch", "--signal=USR2")  # what Slurm sends stop_before_end_s before the limit
    if end:
        error = error_of(started)
        assert error.ename == end and "before its time limit of 01:00:00; it had no requeue left" in error.evalue
        assert shown(site) == "timed out"
        assert statuses(site.cells()) == ["completed", "failed", "pending"]
    else:
        done = started.result(120)
        first = int(printed(done.cells[1]).split()[2])
        assert 0 < first < 150 and printed(done.cells[2]) == "the last cell\n" and job.report["restarts"] == 1
        assert (tmp_path / "steps").read_text().split() == [str(step) for step in range(150)]


def test_a_real_time_limit(site):
    error = error_of(site.started(site.notebook(WAITS), "time=00:01:00 stop_before_end_s=5 requeues=0"), 150)
    assert error.ename == "JobTimedOut" and "time limit of 00:01:00" in error.evalue


def test_the_loss_of_the_first_node_starts_the_job_again_and_it_goes_on(site, cluster, tmp_path):
    notebook = site.notebook(STEPS.format(path=str(tmp_path / "steps"), steps=60, pause=0.1))
    started = site.started(notebook)
    job = waiting(site)
    lost = job.report["node"]
    cluster.crash(lost)
    done = started.result(150)
    cluster.boot(lost)
    assert 0 < int(printed(done.cells[1]).split()[2]) <= 60 and job.report["node"] != lost
    assert (tmp_path / "steps").read_text().split() == [str(step) for step in range(60)]


@pytest.mark.parametrize("requeues", [0, 1])
def test_the_loss_of_another_node_is_told_from_an_error_of_the_cell(site, cluster, tmp_path, requeues):
    cell = STEPS.format(path=str(tmp_path / "steps"), steps=3, pause=0) + (
        "import subprocess\nif done == 0:\n    print('srun', flush=True)\n"
        "    subprocess.run('srun --nodes=2 --ntasks=2 --ntasks-per-node=1 sleep 300', shell=True, check=True)")
    started = site.started(site.notebook(cell), f"nodes=2 requeues={requeues}")
    until(lambda: "srun" in site.shown(1), "the step", 90)
    job = site.jobs()[0]
    cluster.crash("node2")
    try:
        if not requeues:
            assert error_of(started).ename == "NodeLost" and shown(site) in ("node lost", "node_fail")
            return
        until(lambda: ask_slurm(job.record["job_id"]).state == "PENDING", "the requeue", 120)
        assert shown(site).startswith("pending")
    finally:
        cluster.boot("node2")
    assert printed(started.result(150).cells[1]).startswith("from step 3") and job.report["restarts"] == 1


def test_a_restarted_controller_costs_nothing(site, cluster):
    started = site.started(site.notebook(STEPS.format(path=str(site.folder / "steps"), steps=60, pause=0.2)))
    waiting(site)
    jobs, runs_since = cluster.folder / "state" / "job_state", time.time()
    until(lambda: jobs.exists() and jobs.stat().st_mtime > runs_since, "the job in Slurm's saved state", 30)
    cluster.stop("slurmctld", signal.SIGKILL)
    until(lambda: len((site.folder / "steps").read_text().split()) > 50, "a few steps", 60)
    cluster.start("slurmctld")
    assert "all steps" in printed(started.result(90).cells[1]) and shown(site) == "finished"


def test_a_job_that_slurm_forgot_without_a_result_is_lost(site, cluster):
    started = site.started(site.notebook(WAITS))
    job = waiting(site)
    cluster.forget(lambda: os.kill(job.report["pid"], signal.SIGKILL))
    error = error_of(started, 120)
    assert error.ename == "JobLost" and shown(site) == "unknown"
