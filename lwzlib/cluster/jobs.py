"""Jobs: the folder of each, what the job reports of itself, what Slurm says of it, and which of the two is the truth.

The job's own result comes first. Without one, Slurm's word counts: `scontrol`, and `sacct` (where there is accounting) once
the controller has forgotten the job. A job that nobody knows and that left no result is lost. A controller that does not
answer says nothing about a job.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import read_json, read_rows, read_yaml, write_atomic
from lwzlib.base.run_folder import status_of
from lwzlib.cluster.profile import ClusterError, run_command

FINAL = ("finished", "failed", "timed out", "node lost")  # what a job may report of its own end
_SETTLE_S = 4  # the end of a job is Slurm's word only after this: its result, or its requeue, may still come
_ENDS = read_yaml(TEXTS / "job_ends.yaml")
_OUT_OF_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill|out of memory", re.I)


class SlurmStatus(NamedTuple):
    """Slurm's word on a job."""

    state: str  # as Slurm calls it; UNKNOWN where it has no such job
    reason: str = ""
    nodes: str = ""
    restarts: str = "0"
    exit: str = ""


class End(NamedTuple):
    """How a job ended; with a `name`, papermill gets the message as an error of that name."""

    state: str  # finished, failed, or a key of texts/job_ends.yaml
    name: str = ""  # of the error; empty: the notebook's cells tell it all
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted job, known by its folder alone: `job.json` is the client's, `state.json` the job's, the log Slurm's."""

    folder: Path

    @property
    def record(self) -> dict:
        """Content of `job.json`: what was submitted."""
        return read_json(self.folder / "job.json")

    def note(self, **more) -> None:
        """Add to what was submitted, or replace some of it: `job_id`, `seen`."""
        write_atomic(self.folder / "job.json", json.dumps(self.record | more, indent=1))

    @property
    def report(self) -> dict:
        """Content of `state.json`: the job's own account; {} before it starts."""
        try:
            return read_json(self.folder / "state.json")  # opening it makes NFS look at the server
        except FileNotFoundError:
            return {}

    @property
    def log(self) -> Path:
        """The file of what the job prints, under submitit's name for it; there once the job has started."""
        return self.folder / f"{self.record['job_id']}_0_log.out"

    def log_tail(self, lines: int = 15) -> list[str]:
        """Last lines of the log; [] before the job has started."""
        try:
            return self.log.read_text(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            return []

    def cancel(self) -> None:
        """Cancel the job. Raises ClusterError with Slurm's reason if it refuses."""
        answer = run_command("scancel", self.record["job_id"])
        if answer.returncode:
            raise ClusterError(f"job {self.record['job_id']} could not be cancelled: {answer.stderr.strip()}. "
                               f"By hand: scancel {self.record['job_id']}")

    def end(self, status: SlurmStatus | None) -> End | None:
        """How the job ended; None while it goes on, or while nobody can tell."""
        report, record = self.report, self.record
        state = report.get("state", "")
        if state in ("finished", "failed"):
            return End(state)
        if state not in FINAL:
            if status is None or status.state not in _ENDS:
                return None
            state = status.state
            if state in ("FAILED", "CANCELLED", "COMPLETED") and _OUT_OF_MEMORY.search("\n".join(self.log_tail(50))):
                state = "OUT_OF_MEMORY"
        name, message = _ENDS[state]
        details = record["profile"] | {"nodes": report.get("nodes", ""), "exit": status.exit if status else ""}
        why = f": {report['why']}" if report.get("why") else ""
        return End(state, name, f"Slurm job {record['job_id']} {message.format(**details)}{why}")


def watch(job: Job, tell: Callable[[str], None]) -> Iterator[End | None]:
    """How the job ended, asked again with each `next`; None while it goes on. The job's own report counts at once; Slurm, asked
    every `poll_s` s, must say it for a while. `tell` gets each new state of the job."""
    told, status, next_s, ended_s = "submitted", None, 0.0, None
    while True:
        if not (end := job.end(None)) and (now_s := time.monotonic()) >= next_s:
            status = ask_slurm(job.record["job_id"])
            end = job.end(status)
            ended_s = (ended_s or now_s) if end else None
            next_s = now_s + (1 if end else job.record["profile"]["poll_s"])
            if ended_s and now_s - ended_s < _SETTLE_S:
                end = None
        if (text := describe(job.report, status)) != told:
            tell(f"job {job.record['job_id']} {text}")
            told = text
        yield end


def describe(report: dict, status: SlurmStatus | None) -> str:
    """One line: the state, the nodes, why the job waits."""
    if status is None:
        return f"{report['state']} on {report['nodes']}" if report else "submitted"
    where = f" on {status.nodes}" if status.nodes else ""
    why = f" ({status.reason})" if status.state != "RUNNING" and status.reason not in ("", "None") else ""
    again = f", start {int(status.restarts) + 1}" if status.restarts != "0" else ""
    return f"{status.state.lower()}{where}{why}{again}"


def ask_slurm(job_id: str) -> SlurmStatus | None:
    """Slurm's word on a job now; None where it does not answer."""
    try:
        answer = run_command("scontrol", "-o", "show", "job", job_id, timeout=60)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None
    if answer.returncode:
        return _from_accounting(job_id) if "Invalid job id" in answer.stderr else None
    fields = dict(re.findall(r"(\w+)=(\S*)", answer.stdout))
    nodes = fields.get("NodeList", "").replace("(null)", "")
    return SlurmStatus(fields["JobState"], fields["Reason"], nodes, fields.get("Restarts", "0"), fields.get("ExitCode", ""))


def _from_accounting(job_id: str) -> SlurmStatus | None:
    if not shutil.which("sacct"):
        return SlurmStatus("UNKNOWN")
    answer = run_command("sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,NodeList,ExitCode")
    if answer.returncode and "disabled" not in answer.stderr:
        return None
    if not answer.stdout.strip():
        return SlurmStatus("UNKNOWN")
    state, nodes, code = answer.stdout.strip().splitlines()[-1].split("|")
    return SlurmStatus(state.split()[0], nodes=nodes, exit=code)  # `CANCELLED by 1000`


def id_of(name: str) -> str | None:
    """Id of the job of this name, where the client died before it could note the id."""
    answer = run_command("squeue", "--me", "-h", "-t", "all", f"--name={name}", "-o", "%i")
    if answer.returncode:
        raise ClusterError(f"Slurm does not answer: {answer.stderr.strip()}")
    return answer.stdout.split()[-1] if answer.stdout.split() else None


def name_of(output: str) -> str:
    """One name for all the jobs that make one output."""
    return f"{Path(output).stem}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


def jobs_of(folder: Path, name: str) -> list[Job]:
    """The jobs that were submitted under a name, oldest first."""
    numbers = sorted(int(path.parent.name) for path in (folder / name).glob("[0-9]*/job.json"))
    return [Job(folder / name / str(number)) for number in numbers]


def summary(job: Job) -> dict[str, str]:
    """State, nodes, stage, step and tokens/s of a job, as text; what nobody knows is empty."""
    report, record = job.report, job.record
    state = "not submitted"
    if job_id := record.get("job_id"):
        status = ask_slurm(job_id) if report.get("state") not in FINAL else None
        end = job.end(status)
        state = end.state.lower() if end else describe(report, status) if status else "Slurm does not answer"
    run_folder, arm = Path(record["cwd"]) / record["parameters"].get("run_dir", "runs"), record["parameters"].get("arm")
    return {"state": state, "nodes": report.get("nodes", ""), "stage": "", "step": "", "tokens_per_s": ""} | _progress(
        run_folder, arm)


def _progress(root: Path, arm: str | None) -> dict[str, str]:
    """The stage that was last at work, its step and its rate, from its folder alone: a recipe may need the hub to be read."""
    paths = [*root.glob("*/status.json"), *(root / arm).glob("*/status.json")] if arm else [*root.glob("**/status.json")]
    if not paths:
        return {}
    latest = max(paths, key=lambda path: path.stat().st_mtime)
    status, rate = status_of(latest.parent), tokens_per_s(latest.parent)
    return {"stage": latest.parent.name, "step": f"{status['step']}/{status['total']}" if status.get("total") else "",
            "tokens_per_s": f"{rate:.0f}" if rate else ""}


def tokens_per_s(stage: Path, last: int = 10) -> float | None:
    """Tokens per second in the last steps of a stage: of completions (GRPO), or of what it trains on. None where a row does
    not tell."""
    rows = [row for row in read_rows(stage / "metrics.jsonl")[-last:] if row.get("step_s")]
    grpo = read_yaml(stage / "recipe.yaml").get("grpo", {}) if rows else {}
    completions, tokens = grpo.get("group_size", 0) * grpo.get("queries_per_step", 0), 0.0
    for row in rows:
        if "completion_tokens" not in row and row.get("tokens") is None:
            return None
        tokens += row["completion_tokens"] * completions if "completion_tokens" in row else row["tokens"]
    return tokens / sum(row["step_s"] for row in rows) if rows else None
