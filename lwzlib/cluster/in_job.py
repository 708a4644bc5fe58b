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
from lwzlib.cluster.jobs import FINAL  # noqa: E402

_ANSWER_S = 60  # a node that does not start a command within it is lost
_SAVE_S = 1.0
_stopped: list[int] = []  # the signal that said so


class Head(NBClientEngine):
    """papermill's own; it stops between two cells too, and a kernel that died leaves its cell failed, not completed.

    `live` is written whole, at most a second after an output came: papermill's own autosave waits for the output after it."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, live=None, **options):
        """papermill's, with `nb_man` saving into `live`. Raises what stopped it, when its cell says so."""
        start, now = nb_man.cell_start, [nb_man.nb.cells[0], 0]

        def save(*_, **more):
            signal.setitimer(signal.ITIMER_REAL, 0)
            write_atomic(live, nbformat.writes(nb_man.nb))

        def save_soon():
            if not signal.getitimer(signal.ITIMER_REAL)[0]:
                signal.setitimer(signal.ITIMER_REAL, _SAVE_S)

        def cell_start(cell, cell_index=None, **more):
            now[:] = [cell, cell_index]
            if _stopped:
                raise CellExecutionError("", "Stopped", "the time limit is near")
            return start(cell, cell_index, **more)

        nb_man.cell_start, nb_man.save, nb_man.autosave_cell = cell_start, save, save_soon
        signal.signal(signal.SIGALRM, save)
        try:
            return super().execute_managed_notebook(nb_man, kernel_name, **options)
        except Exception:
            nb_man.cell_exception(now[0], cell_index=now[1])
            raise


class State:
    """The job's own account of itself, kept over requeues."""

    def __init__(self, folder: Path):
        self.path = folder / "state.json"
        self.now = json.loads(self.path.read_text()) if self.path.exists() else {}

    def say(self, state: str, **more) -> None:
        """Write `state`, the time and `more` into `state.json`, beside what it held."""
        self.now |= {"state": state, "at": time.time()} | more
        write_atomic(self.path, json.dumps(self.now, indent=1))


def main(folder: Path) -> int:
    """Run the notebook of the job in `folder` and leave what became of it in `state.json`."""
    asked, state = json.loads((folder / "job.json").read_text()), State(folder)
    if state.now.get("state") in FINAL:
        return 0  # a node was lost after the end, and Slurm started the job again
    restarts, allowed = int(os.environ.get("SLURM_RESTART_COUNT", "0")), asked["profile"]["requeues"]
    state.say("running", job_id=os.environ["SLURM_JOB_ID"], node=socket.gethostname(), restarts=restarts, why="",
              nodes=os.environ["SLURM_JOB_NODELIST"], pid=os.getpid())
    if restarts > allowed:
        state.say("node lost", why=f"the job was started again {allowed} times already (requeues = {allowed})")
        return 1
    signal.signal(signal.SIGUSR2, _interrupt)
    if cannot := _lost_node():
        print(f"srun does not reach every node; a failing cell will not be taken for a lost node: {cannot}", flush=True)
    try:
        return _execute(folder, asked, state, restarts < allowed, not cannot)
    finally:
        _clean(asked["profile"]["scratch"])


def _execute(folder: Path, asked: dict, state: State, again: bool, reached: bool) -> int:
    os.chdir(asked["cwd"])
    notebook = nbformat.read(folder / "input.ipynb", 4)
    try:
        notebook = Head.execute_notebook(notebook, asked["kernel"], progress_bar=False, live=folder / "live.ipynb",
                                         **asked["options"])
    except Exception as error:
        if not _stopped:
            state.say("running", why=str(error).strip())  # the kernel died: Slurm may know why
            raise
    failed = any(cell.metadata.papermill.exception for cell in notebook.cells)
    if _stopped:
        return _again(state, again, "timed out")
    if failed and reached and (why := _lost_node()):
        return _again(state, again, "node lost", why)
    state.say("failed" if failed else "finished")
    return int(failed)


def _interrupt(number, frame):
    if not _stopped:  # a second Ctrl-C would cut short the writing of the checkpoint
        for kernel in psutil.Process().children():
            kernel.send_signal(signal.SIGINT)
    _stopped.append(number)


def _lost_node() -> str:
    """Why a node of the allocation is lost; empty if each starts a command."""
    count = os.environ["SLURM_JOB_NUM_NODES"]
    if count == "1" or not shutil.which("srun"):
        return ""
    command = ["srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--cpus-per-task=1", "true"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S)
    except subprocess.TimeoutExpired:
        return f"srun did not reach all of {os.environ['SLURM_JOB_NODELIST']} within {_ANSWER_S} s"
    return tried.stderr.strip() if tried.returncode else ""


def _again(state: State, allowed: bool, end: str, why: str = "") -> int:
    """Back into the queue, where it is allowed: Slurm then ends this process."""
    if not allowed:
        state.say(end, why=why)
        return 1
    state.say("requeued", why=f"{end} {why}".strip())
    asked = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
    if asked.returncode:
        state.say(end, why=f"{why}; it could not be started again: {asked.stderr.strip()}")
        return 1
    signal.pause()
    return 1


def _clean(scratch: str | None) -> None:
    if scratch and (folder := os.environ.get("TMPDIR", "")).startswith(scratch):
        count = os.environ["SLURM_JOB_NUM_NODES"]
        shutil.rmtree(folder, ignore_errors=True)
        if count != "1":
            subprocess.run(["srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "rm", "-rf", folder],
                           timeout=_ANSWER_S, capture_output=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
