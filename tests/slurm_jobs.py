"""Small notebooks for the engine `slurm`, and clients that run them through papermill on the Slurm of this machine."""

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError
from polling import until

from lwzlib.cluster.jobs import Job, jobs_of

# One line in `{path}` for each step that is done, as a stage's checkpoints: what was done is not done again.
STEPS = """
import time
from pathlib import Path
path = Path({path!r})
done = len(path.read_text().split()) if path.exists() else 0
print("from step", done)
for step in range(done, {steps}):
    with path.open("a") as file:
        print(step, file=file)
    time.sleep({pause})
print("all steps")
"""


class Site:
    """A profile of its own for each test, and the notebooks that it starts."""

    def __init__(self, folder: Path, **changes):
        self.folder, self.jobs_folder = folder, folder / "jobs"
        small = {"extends": "generic", "gpus_per_node": 0, "gpu": None, "cpus_per_node": 1, "memory_gb_per_node": 2,
                 "time": "01:00:00", "requeues": 1, "jobs": str(self.jobs_folder), "poll_s": 1} | changes
        self.profile = folder / "profile.yaml"
        self.profile.write_text(yaml.safe_dump(small))

    def notebook(self, *cells: str, parameters: str = 'recipe = "smoke"\nseed = 0') -> Path:
        made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}})
        made.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
        made.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(made, self.folder / "in.ipynb")
        return self.folder / "in.ipynb"

    def run(self, notebook: Path, changes: str = "", output: str = "out.ipynb", **parameters):
        return papermill.execute_notebook(notebook, self.folder / output, parameters, engine_name="slurm", progress_bar=False,
                                          profile=f"{self.profile} {changes}")

    def started(self, notebook: Path, changes: str = "", **parameters) -> concurrent.futures.Future:
        """`run` in a thread; its error is that of papermill."""
        future = concurrent.futures.Future()

        def work():
            try:
                future.set_result(self.run(notebook, changes, **parameters))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def client(self, notebook: Path, *words: str) -> subprocess.Popen:
        """What a researcher types."""
        command = [sys.executable, "-m", "papermill", notebook, self.folder / "out.ipynb", "--engine", "slurm", *words]
        return subprocess.Popen(list(map(str, command)), env=os.environ | {"LWZ_PROFILE": str(self.profile)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def jobs(self) -> list[Job]:
        return [job for path in sorted(self.jobs_folder.glob("*/")) for job in jobs_of(self.jobs_folder, path.name)]

    def running(self, seconds: float = 60) -> Job:
        """The job, once it says that it runs."""
        return until(lambda: next((job for job in self.jobs() if job.report.get("state") == "running"), None),
                     "the job", seconds)

    def cells(self) -> list:
        """Code cells of the local notebook, without papermill's own."""
        try:
            cells = nbformat.read(self.folder / "out.ipynb", 4).cells
        except (ValueError, FileNotFoundError):  # half-written
            return []
        return [cell for cell in cells if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.tags]

    def shown(self, index: int) -> str:
        """What a cell of the local notebook has printed so far."""
        return printed(cells[index]) if (cells := self.cells()) else ""


def printed(cell) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def error_of(started: concurrent.futures.Future, seconds: float = 90) -> PapermillExecutionError:
    error = started.exception(seconds)
    assert isinstance(error, PapermillExecutionError), error
    return error


def statuses(cells) -> list[str]:
    return [cell.metadata.papermill.status for cell in cells]


def nothing_left(folder: Path, seconds: float = 60) -> None:
    """No process of a job of this cluster lives on."""
    with contextlib.suppress(AssertionError):
        until(lambda: not left_running(folder), "the end of every process", seconds)
    assert not (left := left_running(folder)), left


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that a job of this cluster started and that still live."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ = (path / "environ").read_bytes()
            if b"SLURM_JOB_ID=" in environ and str(folder).encode() in environ:
                found.append(f"{path.name} {(path / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
        except OSError:
            continue
    return found
