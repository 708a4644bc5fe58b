"""What the engine `slurm` adds to plain papermill, for a notebook that takes a minute.

Brings up the Slurm of the tests on this machine (root and Debian's packages), so the queue is empty: what is left is the
engine's own checks, submission, start of the job, and the time until the client sees its end. The two take turns.

    python benchmarks/slurm_overhead.py [--runs 2] [--seconds 60]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lwzlib.base.provenance import provenance

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import slurm_cluster  # noqa: E402
from slurm_jobs import Site  # noqa: E402

CELLS = 6


def timed(command: list[str], profile: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"LWZ_PROFILE": f"{profile} poll_s=10"})
    return time.perf_counter() - started


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--runs", type=int, default=2)
    asked.add_argument("--seconds", type=int, default=60)
    asked = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder, slurm_cluster.running(Path(folder)):
        site = Site(Path(folder))
        cell = f"import time\nfor _ in range({asked.seconds // CELLS}):\n    time.sleep(1)\n    print('.', end='', flush=True)"
        command = [sys.executable, "-m", "papermill", str(site.notebook(*[cell] * CELLS)), str(Path(folder) / "out.ipynb")]
        measured = {"papermill": [], "papermill --engine slurm": []}
        version = subprocess.check_output(["sbatch", "--version"], text=True).split()[1]
        for _ in range(asked.runs):
            measured["papermill"].append(timed(command, site.profile))
            measured["papermill --engine slurm"].append(timed([*command, "--engine", "slurm"], site.profile))
    write(asked, measured, version)


def write(asked, measured: dict[str, list[float]], version: str) -> None:
    about = provenance()
    plain, engine = (statistics.mean(times) for times in measured.values())
    lines = ["# Overhead of the engine `slurm`", "",
             f"{about['hardware']}, load {os.getloadavg()[2]:.1f}; {about['started']}; Python {about['python']}, Slurm "
             f"{version}.", "",
             f"A notebook of {CELLS} cells that wait {asked.seconds} seconds in all; {asked.runs} runs of each, in turns.", "",
             "| command | mean, s | each, s |", "|---|--:|---|"]
    lines += [f"| `{name}` | {statistics.mean(times):.2f} | {', '.join(f'{t:.2f}' for t in times)} |"
              for name, times in measured.items()]
    spread = max(measured["papermill"]) - min(measured["papermill"])
    lines += ["", f"The engine adds {engine - plain:.2f} s; ratio {engine / plain:.3f}. The runs of plain papermill differ by "
              f"{spread:.2f} s among themselves: a smaller difference is noise.", ""]
    (HERE / "slurm_overhead.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
