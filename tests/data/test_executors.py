"""The corpus pipeline on a real Slurm: the bytes of a local run, killed and cancelled clients, jobs that fail."""

import signal
import subprocess
import sys

import pytest
import slurm_cluster
from killing import killed_then_finished
from polling import until

from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rows import RunError
from lwzlib.pipeline.stages import run_stage, stage_run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")):
        yield slurm_cluster.PARTITION


def on(partition, memory_gb=1, **more):
    return load_recipe("smoke", {"corpus.slurm": {"partition": partition, "time": "00:10:00", "memory_gb": memory_gb}} | more)


def tokens(folder):
    return {path.name: path.read_bytes() for path in (folder / "tokens").iterdir() if path.suffix in (".ds", ".index")}


def jobs():
    return subprocess.run(["squeue", "-h", "-o", "%i %j"], capture_output=True, text=True).stdout.split("\n")


def test_a_job_array_gives_the_bytes_of_a_local_run_also_when_its_client_is_killed(smoke, cluster, tmp_path):
    local = run_stage("corpus", smoke, tmp_path / "local", 0)

    def submitted(step):
        return lambda run: (run.folder / "steps" / step / "job_id").exists()

    run = killed_then_finished("corpus", on(cluster), tmp_path / "slurm", [submitted("clean"), submitted("tokens")])
    assert tokens(run.folder) == tokens(local) and len(tokens(local)) == 8
    submitted_jobs = {path.name.split("_")[0] for path in (run.folder / "steps" / "clean" / "slurm_logs").iterdir()}
    assert len(submitted_jobs) == 1, "the jobs of a killed client are waited for, not submitted again"
    assert (run.folder / "report.json").read_bytes() == (local / "report.json").read_bytes()


def test_a_job_that_fails_is_named_with_its_log_and_submitted_again(cluster, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.jsonl").write_text('{"no text": 1}\n')
    r = on(cluster, **{"corpus.sources": [{"at": str(tmp_path / "books"), "language": "en", "weight": 1.0}], "corpus.parts": 2})
    with pytest.raises(RunError, match=r"left the queue and 1 tasks of step clean are not done, first 0: see .*slurm_logs"):
        run_stage("corpus", r, tmp_path / "run", 0)
    run = stage_run("corpus", r, tmp_path / "run", 0)
    assert "needs a field text" in "".join(p.read_text() for p in (run.folder / "steps/clean/slurm_logs").iterdir())
    (tmp_path / "books" / "a.jsonl").write_text('{"text": "%s"}\n' % ("It rains on the market and the people go home. " * 20))
    run_stage("corpus", r, tmp_path / "run", 0)
    assert run.finished


def test_ctrl_c_cancels_the_jobs(cluster, tmp_path):
    r = on(cluster, **{"corpus.workers": 1})
    (tmp_path / "asked.yaml").write_text(r.model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "lwzlib.cli.main", "stage", "corpus", tmp_path / "asked.yaml", "--run-dir", tmp_path]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until(lambda: (tmp_path / "corpus" / "steps" / "clean" / "job_id").exists(), "the job", 60)
    assert any("lwz-clean" in job for job in jobs())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    until(lambda: not any("lwz-clean" in job for job in jobs()), "the end of the job", 60)


def test_a_partition_that_is_not_there_says_so(cluster, tmp_path):
    with pytest.raises(RunError, match="sbatch refused step clean"):
        run_stage("corpus", on("no-such"), tmp_path, 0)


def test_a_wrong_time_limit_is_refused_before_anything_runs():
    with pytest.raises(RecipeError, match=r"corpus\.slurm\.time = 'soon'"):
        load_recipe("smoke", {"corpus.slurm": {"partition": "cpu", "time": "soon", "memory_gb": 1}})
