"""Where the tasks of a corpus step run: as processes here, or as a job array on Slurm. Both are datatrove's executors."""

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


def run_tasks(name: str, tasks: int, pipeline: list, logs: Path, asked: Corpus) -> None:
    """Do the tasks of a step that are not done yet. Raises RunError where Slurm gave up; a task's own error as it is."""
    logger.remove()  # its log stands in `logs`
    if asked.slurm:
        _on_slurm(name, tasks, pipeline, logs, asked)
    else:
        Local(pipeline, tasks, min(tasks, asked.workers), str(logs)).run()


class Local(LocalPipelineExecutor):
    """datatrove's own, with processes that end when it is killed (its manager does not), and a line of progress in the
    place of its log."""

    def run(self):
        """datatrove's, for the tasks not done yet: one by one here with one worker, else in a pool; no counts are summed up."""
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
    """datatrove's own, without the job that sums up counts: nobody reads them, and cancelled arrays leave it pending."""

    def launch_merge_stats(self):
        """datatrove calls it when the array is submitted; here it submits nothing."""
        pass


def _on_slurm(name: str, tasks: int, pipeline: list, logs: Path, asked: Corpus) -> None:
    """Submit a job array and wait for it. Killed meanwhile, the next call waits for the same jobs; Ctrl-C cancels them."""
    assert asked.slurm, "the caller looked"
    executor = Slurm(
        pipeline, tasks, asked.slurm.time, asked.slurm.partition, mem_per_cpu_gb=asked.slurm.memory_gb,
        workers=asked.workers, job_name=f"lwz-{name}", qos="", logging_dir=str(logs),
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH")
    record = logs / "job_id"
    if not executor.get_incomplete_ranks():
        return
    if not (record.exists() and _queued(record.read_text())):
        _submit(name, executor)
        write_atomic(record, str(executor.job_id))
    job = record.read_text()
    print(f"{name}: Slurm job {job}, {tasks} tasks", flush=True)
    try:
        _wait(name, executor, job, logs)
    except KeyboardInterrupt:
        subprocess.run(["scancel", job])
        raise


def _submit(name: str, executor: Slurm) -> None:
    try:
        executor.run()
    except FileNotFoundError:
        raise RunError("corpus.slurm is set, and this machine has no sbatch: start from a login node, or set "
                       "corpus.slurm=null") from None
    except subprocess.CalledProcessError:
        raise RunError(f"sbatch refused step {name}, for the reason above; its script is in "
                       f"{executor.logging_dir.resolve_paths('launch_script.slurm')}") from None


def _wait(name: str, executor: Slurm, job: str, logs: Path) -> None:
    before, gone = None, 0
    while missing := executor.get_incomplete_ranks():
        if len(missing) != before:
            print(f"{name}: {executor.tasks - len(missing)}/{executor.tasks} tasks done", flush=True)
            before = len(missing)
        gone = 0 if _queued(job) else gone + 1
        if gone > 3:  # a shared file system may show a task's mark a moment after its job has left the queue
            raise RunError(f"Slurm job {job} left the queue and {len(missing)} tasks of step {name} are not done, first "
                           f"{missing[0]}: see {logs / 'slurm_logs'}. The same command submits them again")
        time.sleep(_POLL_S)


def _queued(job: str) -> bool:
    """Slurm has it pending or running; also where Slurm does not answer, which says nothing about the job."""
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%i"], capture_output=True, text=True)
    return bool(done.stdout.strip()) if done.returncode == 0 else "Invalid job id" not in done.stderr
