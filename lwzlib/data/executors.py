"""Run the tasks of a corpus step, as processes here or as a job array on Slurm, by datatrove's executors.

What the kit adds: local processes end when their parent is killed, progress is one line a task, and a step waits for its job
array, also for one that a killed client had submitted.
"""

import contextlib
import copy
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from loguru import logger

from lwzlib.base.processes import end_with
from lwzlib.base.quantities import Corpus
from lwzlib.base.rows import RunError, write_atomic

_POLL_S = 2.0


def run_tasks(name: str, tasks: int, pipeline: list, logs: Path, settings: Corpus) -> None:
    """Do the tasks of step `name` that are not done yet. Raises RunError where Slurm gave up; a task's own error as it is."""
    logger.remove()  # datatrove's log stands in `logs`
    if not settings.slurm:
        Local(pipeline, tasks, min(tasks, settings.workers), str(logs)).run()
        return
    slurm = Slurm(pipeline, tasks, settings.slurm.time, settings.slurm.partition, mem_per_cpu_gb=settings.slurm.memory_gb,
                  workers=settings.workers, job_name=f"lwz-{name}", qos="", logging_dir=str(logs),
                  env_command=f"export PATH={Path(sys.executable).parent}:$PATH")
    if slurm.get_incomplete_ranks():
        _finish_on_slurm(name, slurm, logs)


class Local(LocalPipelineExecutor):
    """datatrove's local executor, without its manager process (which outlives a kill) and without a sum of the counts."""

    def run(self):
        """Do the tasks that are not done yet: one by one in this process with one worker, else in a pool."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                copy.deepcopy(self)._run_for_rank(rank)
        elif ranks:
            with multiprocess.get_context("forkserver").Pool(self.workers, lambda: end_with(os.getppid())) as pool:
                list(pool.imap_unordered(self._run_for_rank, ranks))

    def _run_for_rank(self, rank, local_rank=0, node_rank=-1):
        with contextlib.redirect_stderr(io.StringIO()):
            stats = super()._run_for_rank(rank, 1, node_rank)
        print(f"{Path(self.logging_dir.path).name}: task {rank + 1}/{self.tasks}", flush=True)
        return stats


class Slurm(SlurmPipelineExecutor):
    """datatrove's Slurm executor, without the job that sums up counts: nobody reads them, and a cancelled array leaves it
    pending."""

    def launch_merge_stats(self):
        """Submit nothing, where datatrove submits that job."""


def _finish_on_slurm(name: str, slurm: Slurm, logs: Path) -> None:
    """Submit a job array and wait for it. Killed meanwhile, the next call waits for the same jobs; Ctrl-C cancels them."""
    record = logs / "job_id"
    if not (record.exists() and _queued(record.read_text())):
        try:
            slurm.run()
        except FileNotFoundError:
            raise RunError("corpus.slurm is set, and this machine has no sbatch: start from a login node, or set "
                           "corpus.slurm=null") from None
        except subprocess.CalledProcessError:
            raise RunError(f"sbatch refused step {name}, for the reason above; its script is in "
                           f"{slurm.logging_dir.resolve_paths('launch_script.slurm')}") from None
        write_atomic(record, str(slurm.job_id))
    job = record.read_text()
    print(f"{name}: Slurm job {job}, {slurm.tasks} tasks", flush=True)
    try:
        _wait(name, slurm, job, logs)
    except KeyboardInterrupt:
        subprocess.run(["scancel", job])
        raise


def _wait(name: str, slurm: Slurm, job: str, logs: Path) -> None:
    missing_before, polls_without_job = None, 0
    while missing := slurm.get_incomplete_ranks():
        if len(missing) != missing_before:
            print(f"{name}: {slurm.tasks - len(missing)}/{slurm.tasks} tasks done", flush=True)
            missing_before = len(missing)
        polls_without_job = 0 if _queued(job) else polls_without_job + 1
        if polls_without_job > 3:  # a shared file system may show a task's mark a moment after its job has left the queue
            raise RunError(f"Slurm job {job} left the queue and {len(missing)} tasks of step {name} are not done, first "
                           f"{missing[0]}: see {logs / 'slurm_logs'}. The same command submits them again")
        time.sleep(_POLL_S)


def _queued(job: str) -> bool:
    """Whether Slurm has the job pending or running; True where Slurm does not answer, which says nothing about the job."""
    answer = subprocess.run(["squeue", "-h", "-j", job, "-o", "%i"], capture_output=True, text=True)
    return bool(answer.stdout.strip()) if answer.returncode == 0 else "Invalid job id" not in answer.stderr
