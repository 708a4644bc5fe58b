"""Inside the job, on the first node of the allocation: executes the notebook. `state.json` tells everybody how it went.

A job ends here as `finished`, `failed` (a cell), `timed out` or `node lost`; any other end is Slurm's to tell. Before its time
limit Slurm sends SIGUSR2: the cell that runs is interrupted as by Ctrl-C, so that its stage can write a checkpoint. After a
time limit or the loss of a node the job goes back into the queue, and the notebook runs again from the top: what was finished
is loaded, the rest goes on from its checkpoint.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# jsonschema, which nbformat imports, would build a grammar of IRIs: a second of processor time for what no notebook holds.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

import nbformat  # noqa: E402
import psutil  # noqa: E402
from nbclient.exceptions import CellExecutionError  # noqa: E402
from papermill.engines import NBClientEngine  # noqa: E402

from lwzlib.base.rows import write_atomic  # noqa: E402
from lwzlib.cluster.jobs import FINAL, Job  # noqa: E402
from lwzlib.cluster.profile import run_command  # noqa: E402

_ANSWER_S = 60  # a node that does not start a command within it is lost
_SAVE_S = 1.0
_stop_signals: list[int] = []  # those that came before the time limit


class Head(NBClientEngine):
    """papermill's own engine, which here stops between two cells too, and marks the cell of a kernel that died as failed.

    `live` is written whole, at most a second after an output came: papermill's own autosave waits for the output after it."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, live=None, **options):
        """Execute the notebook, saving it into `live`. Raises what stopped it, once its cell says so."""
        start_cell, current = nb_man.cell_start, (nb_man.nb.cells[0], 0)

        def save(*_, **__):
            signal.setitimer(signal.ITIMER_REAL, 0)
            write_atomic(live, nbformat.writes(nb_man.nb))

        def save_soon():
            if not signal.getitimer(signal.ITIMER_REAL)[0]:
                signal.setitimer(signal.ITIMER_REAL, _SAVE_S)

        def start_unless_stopped(cell, cell_index=None, **more):
            nonlocal current
            current = cell, cell_index
            if _stop_signals:
                raise CellExecutionError("", "Stopped", "the time limit is near")
            return start_cell(cell, cell_index, **more)

        nb_man.cell_start, nb_man.save, nb_man.autosave_cell = start_unless_stopped, save, save_soon
        signal.signal(signal.SIGALRM, save)
        try:
            return super().execute_managed_notebook(nb_man, kernel_name, **options)
        except Exception:
            nb_man.cell_exception(current[0], cell_index=current[1])
            raise


def report(folder: Path, state: str, **more) -> None:
    """Write `state`, the time and `more` into `state.json`, beside what it held, also before a requeue."""
    content = Job(folder).report | {"state": state, "at": time.time()} | more
    write_atomic(folder / "state.json", json.dumps(content, indent=1))


def main(folder: Path) -> int:
    """Run the notebook of the job in `folder` and leave what became of it in `state.json`; the exit code."""
    record = Job(folder).record
    if Job(folder).report.get("state") in FINAL:
        return 0  # a node was lost after the end, and Slurm started the job again
    restarts, allowed = int(os.environ.get("SLURM_RESTART_COUNT", "0")), record["profile"]["requeues"]
    report(folder, "running", job_id=os.environ["SLURM_JOB_ID"], node=socket.gethostname(), restarts=restarts, why="",
           nodes=os.environ["SLURM_JOB_NODELIST"], pid=os.getpid())
    if restarts > allowed:
        report(folder, "node lost", why=f"the job was started again {allowed} times already (requeues = {allowed})")
        return 1
    signal.signal(signal.SIGUSR2, _interrupt)
    if why := _on_each_node("true"):
        print(f"srun does not reach every node; a failing cell will not be taken for a lost node: {why}", flush=True)
    try:
        return _execute(folder, record, may_requeue=restarts < allowed, nodes_answer=not why)
    finally:
        _remove_scratch(record["profile"]["scratch"])


def _execute(folder: Path, record: dict, may_requeue: bool, nodes_answer: bool) -> int:
    os.chdir(record["cwd"])
    notebook = nbformat.read(folder / "input.ipynb", 4)
    try:
        notebook = Head.execute_notebook(notebook, record["kernel"], progress_bar=False, live=folder / "live.ipynb",
                                         **record["options"])
    except Exception as error:
        if not _stop_signals:
            report(folder, "running", why=str(error).strip())  # the kernel died: Slurm may know why
            raise
    failed = any(cell.metadata.papermill.exception for cell in notebook.cells)
    if _stop_signals:
        return _requeue(folder, may_requeue, "timed out")
    if failed and nodes_answer and (why := _on_each_node("true")):
        return _requeue(folder, may_requeue, "node lost", why)
    report(folder, "failed" if failed else "finished")
    return int(failed)


def _interrupt(number, frame):
    if not _stop_signals:  # a second Ctrl-C would cut short the writing of the checkpoint
        for kernel in psutil.Process().children():
            kernel.send_signal(signal.SIGINT)
    _stop_signals.append(number)


def _on_each_node(*command: str) -> str:
    """Start a command on each node, where there are several; why that failed (a node is lost, no srun), or ""."""
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    if nodes == "1":
        return ""
    if not shutil.which("srun"):
        return "there is no srun here"
    try:
        answer = run_command("srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
                             "--cpus-per-task=1", *command, timeout=_ANSWER_S)
    except subprocess.TimeoutExpired:
        return f"srun did not reach all of {os.environ['SLURM_JOB_NODELIST']} within {_ANSWER_S} s"
    return answer.stderr.strip() if answer.returncode else ""


def _requeue(folder: Path, allowed: bool, end: str, why: str = "") -> int:
    """Requeue the job if `allowed`, and wait for Slurm to end this process; else report `end` and return the exit code 1."""
    if allowed:
        report(folder, "requeued", why=f"{end} {why}".strip())
        answer = run_command("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
        if not answer.returncode:
            signal.pause()
            return 1
        why = f"{why}; it could not be started again: {answer.stderr.strip()}"
    report(folder, end, why=why)
    return 1


def _remove_scratch(scratch: str | None) -> None:
    folder = os.environ.get("TMPDIR", "")
    if scratch and folder.startswith(scratch):
        shutil.rmtree(folder, ignore_errors=True)
        if why := _on_each_node("rm", "-rf", folder):
            print(f"the scratch folder {folder} of other nodes may be left: {why}", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
