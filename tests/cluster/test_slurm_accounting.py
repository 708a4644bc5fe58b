"""A real Slurm with accounting: what the controller has forgotten, `sacct` remembers."""

import os
import signal
import subprocess

import pytest
import slurm_cluster
from polling import until
from slurm_jobs import Site, error_of, nothing_left

from lwzlib.cluster import jobs
from lwzlib.cluster.jobs import ask_slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm"), accounting=True) as cluster:
        yield cluster
        nothing_left(cluster.folder)


def remembered(job) -> str:
    command = ["sacct", "-n", "-P", "-X", "-j", job.record["job_id"], "-o", "State"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(("done_to", "state", "error"), [
    (lambda job: subprocess.run(["scancel", job.record["job_id"]], check=True), "CANCELLED", "JobCancelled"),
    (lambda job: os.kill(job.report["pid"], signal.SIGKILL), "FAILED", "JobKilled")], ids=["cancelled", "killed"])
def test_the_end_of_a_forgotten_job_is_told_by_accounting(cluster, tmp_path, done_to, state, error):
    site = Site(tmp_path, poll_s=20)  # it asks again only after the controller has forgotten
    started = site.started(site.notebook("import time\nprint('here', flush=True)\ntime.sleep(600)"))
    job = site.running()
    done_to(job)
    until(lambda: remembered(job).startswith(state), f"{state} in the accounts", 60)
    cluster.forget()
    until(lambda: ask_slurm(job.record["job_id"]), "the controller", 60)
    seen = ask_slurm(job.record["job_id"])
    assert (seen.state, seen.nodes) == (state, "node1")
    assert error_of(started).ename == error and jobs.summary(job)["state"] == state.lower()
