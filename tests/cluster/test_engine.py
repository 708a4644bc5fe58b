"""The engine slurm on a real Slurm of two nodes: the whole path, what it refuses, Ctrl-C, and a client that is killed."""

import os
import signal
import subprocess
import sys

import pytest
import slurm_cluster
from polling import until
from slurm_jobs import STEPS, Site, nothing_left, printed, statuses

from lwzlib.cluster.jobs import ask_slurm
from lwzlib.pipeline.stages import stage_run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
        nothing_left(cluster.folder)


@pytest.fixture
def site(cluster, tmp_path):
    yield Site(tmp_path)
    subprocess.run(["scancel", "--user", "root"], check=True)  # what a failed test left
    until(lambda: not squeue(), "the end of its jobs", 60)


def squeue() -> list[str]:
    return subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True).stdout.split()


def test_the_notebook_runs_over_two_nodes_and_comes_back_while_it_runs(site, tmp_path):
    go_on = tmp_path / "go-on"
    notebook = site.notebook(
        f"import time\nfrom pathlib import Path\nprint('seed', seed, flush=True)\n"
        f"while not Path({str(go_on)!r}).exists(): time.sleep(0.1)",
        "import socket, subprocess, os\nprint(socket.gethostname(), os.environ['HF_HUB_OFFLINE'], os.environ['TMPDIR'])\n"
        "print(os.nice(0), os.environ['LWZ_CONTAINER'])\n"
        "print(subprocess.run('srun -l --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 hostname', shell=True, "
        "capture_output=True, text=True).stdout)")
    started = site.started(notebook, f"nodes=2 offline=true scratch={tmp_path} container='nice -n 3'", seed=7)
    until(lambda: site.shown(1) == "seed 7\n", "the output of a cell that still runs", 60)
    go_on.touch()
    done = started.result(60)
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    scratch = tmp_path / f"lwz-{site.jobs()[0].record['job_id']}"
    assert printed(cells[-1]).splitlines()[0] == f"node1 1 {scratch}" and not scratch.exists()
    assert int(printed(cells[-1]).splitlines()[1].split()[0]) >= 3 and "nice -n 3" in printed(cells[-1])
    assert sorted(printed(cells[-1]).split()[7:]) == ["0:", "1:", "node1", "node2"]
    assert set(statuses(cells)) == {"completed"} and cells[-1].execution_count == 4
    assert site.jobs()[0].report["state"] == "finished"


def test_a_failing_cell_fails_with_its_traceback_and_the_rest_stays_pending(site):
    client = site.client(site.notebook("print('before')\nraise ValueError('no such weight')", "print('never')"), "--log-output")
    said = client.communicate(timeout=90)[0]
    assert client.returncode == 1 and "ValueError: no such weight" in said and "before" in said
    assert statuses(site.cells())[1:] == ["failed", "pending"]
    assert site.cells()[1].outputs[-1].ename == "ValueError" and len(site.jobs()) == 1


def test_ctrl_c_cancels_the_job(site, cluster):
    client = site.client(site.notebook("import time\nprint('here', flush=True)\ntime.sleep(600)", "print('never')"))
    until(lambda: site.shown(1), "the first line", 60)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert ask_slurm(site.jobs()[0].record["job_id"]).state == "CANCELLED"
    assert statuses(site.cells()) == ["completed", "failed", "pending"]
    assert "cancelled by Ctrl-C" in site.cells()[1].outputs[1].evalue
    nothing_left(cluster.folder)


def test_a_killed_client_finds_its_job_again(site, tmp_path):
    notebook = site.notebook(STEPS.format(path=str(tmp_path / "steps"), steps=60, pause=0.2))
    client = site.client(notebook)
    until(lambda: site.shown(1), "the first line", 60)
    client.kill()
    client.communicate()
    with pytest.raises(RuntimeError, match=r"is being made by Slurm job \d+ of another notebook \(seed was 0, is 3\)"):
        site.run(notebook, seed=3)
    again = site.client(notebook)
    said = again.communicate(timeout=90)[0]
    assert again.returncode == 0 and "found again" in said
    assert printed(site.cells()[1]).split("\n")[:2] == ["from step 0", "all steps"] and len(site.jobs()) == 1
    site.run(notebook)
    assert len(site.jobs()) == 2, "a result that was seen is not given twice"


def abandoned(site, seconds):
    """(notebook, job) of a notebook that takes so long, whose client was killed while it ran."""
    notebook = site.notebook(f"import time\ntime.sleep({seconds})\nprint('made once')")
    client = site.client(notebook)
    job = site.running()
    client.kill()
    client.communicate()
    return notebook, job


def test_a_result_that_nobody_saw_is_given_to_the_next_client(site):
    notebook, job = abandoned(site, 1)
    until(lambda: job.report["state"] == "finished", "the end", 60)
    site.run(notebook)
    assert printed(site.cells()[1]) == "made once\n" and len(site.jobs()) == 1


def test_a_client_killed_before_it_noted_the_job_finds_it_by_its_name(site):
    notebook, job = abandoned(site, 5)
    job.note(job_id=None)
    site.run(notebook)
    assert printed(site.cells()[1]) == "made once\n" and len(site.jobs()) == 1


def test_lwz_jobs_shows_the_state_the_nodes_and_how_far_the_run_is(site, smoke, tmp_path):
    asked = f'recipe = "smoke"\nseed = 0\narm = "base-think"\nrun_dir = {str(tmp_path / "run")!r}'
    started = site.started(site.notebook("import time\nprint('here', flush=True)\ntime.sleep(600)", parameters=asked))
    until(lambda: site.shown(1), "the first line", 60)
    run = stage_run("grpo", smoke, tmp_path / "run", 0, "base-think")
    with run.work():
        run.append("metrics", *({"step": step, "completion_tokens": 50.0, "step_s": 2.0} for step in (1, 2)))
        run.update(step=2, total=4)
    tokens_per_s = 50 * smoke.grpo.group_size * smoke.grpo.queries_per_step / 2
    command = [sys.executable, "-m", "lwzlib.cli.main", "jobs", "--profile", str(site.profile)]

    def shown():
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1].split()

    row, number = shown(), site.jobs()[0].record["job_id"]
    assert row[:2] + row[3:9] == [number, "in", "running", "on", "node1", "node1", "grpo", "2/4"], row
    assert float(row[9]) == round(tokens_per_s)
    subprocess.run(["scancel", number], check=True)
    assert started.exception(60).ename == "JobCancelled" and shown()[3] == "cancelled"


@pytest.mark.parametrize(("changes", "parameters", "reason"), [
    ("", {"sed": 1}, r"no parameter 'sed' \(it has recipe, seed\); did you mean 'seed'\?"),
    ("", {"seed": "one"}, "parameter seed = 'one' must be a number, such as 0"),
    ("", {"recipe": "papper"}, "no recipe 'papper'; did you mean 'paper'"),
    ("partion=cpu", {}, r"no key 'partion'; did you mean 'partition'\?"),
    ("nodes=0", {}, "nodes = 0: Input should be greater than or equal to 1"),
    ("partition=nope", {}, r"Slurm refuses the job \(partition nope.*Invalid partition name specified"),
    ("partition=members account=others", {}, "account others.*Invalid account or account/partition combination"),
    ("partition=short time=10:00:00", {}, "10:00:00.*Requested time limit is invalid"),
    ("partition=broken", {}, r"Requested node configuration is not available; node3 is down\S* \(the power supply burnt\)"),
    ("nodes=3", {}, "3 x .*Node count specification invalid"),
    ("gpus_per_node=4", {}, "4 GPUs.*Requested node configuration is not available"),
    ("sbatch.constraint=h100", {}, "Invalid feature specification"),
])
def test_what_cannot_be_is_refused_with_its_reason_and_nothing_is_submitted(site, changes, parameters, reason):
    with pytest.raises(RuntimeError, match=reason):
        site.run(site.notebook("print('never')"), changes, **parameters)
    assert not (site.folder / "out.ipynb").exists() and not site.jobs() and not squeue()


def test_a_refusal_is_one_line_on_the_command_line(site):
    client = site.client(site.notebook("print('never')"), "-p", "recipe", "papper")
    said = client.communicate(timeout=60)[0]
    assert client.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("Error: no recipe 'papper'; did you mean 'paper'?")


def test_a_controller_that_does_not_answer_refuses(site, cluster):
    notebook = site.notebook("print('never')")
    cluster.stop("slurmctld")
    try:
        with pytest.raises(RuntimeError, match="Unable to contact slurm controller"):
            site.run(notebook)
    finally:
        cluster.start("slurmctld")
        until(lambda: slurm_cluster.idle() == set(slurm_cluster.NODES), "the nodes", 60)
