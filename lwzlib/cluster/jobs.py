"""Jobs: the folder of each, what the job says of itself, what Slurm says of it, and which of the two is the truth.

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
from pathlib import Path
from typing import NamedTuple

import yaml

from lwzlib.base.rows import read_rows, write_atomic
from lwzlib.cluster.profile import ClusterError

FINAL = ("finished", "failed", "timed out", "node lost")  # what a job may say of its own end
_SETTLE_S = 4  # the end of a job is Slurm's word only after this: its result, or its requeue, may still come
_ENDS = {
    "CANCELLED": ("JobCancelled", "was cancelled"),
    "TIMEOUT": ("JobTimedOut", "reached its time limit of {time}"),
    "DEADLINE": ("JobTimedOut", "reached its deadline"),
    "NODE_FAIL": ("NodeLost", "lost a node ({nodes})"),
    "BOOT_FAIL": ("NodeLost", "got a node that did not boot ({nodes})"),
    "OUT_OF_MEMORY": ("JobOutOfMemory", "ran out of memory: {memory_gb_per_node} GB were asked for on each node"),
    "PREEMPTED": ("JobPreempted", "had to give its nodes to another job"),
    "FAILED": ("JobKilled", "was killed or broke down (exit code and signal {exit})"),
    "COMPLETED": ("JobKilled", "ended without a result"),
    "REVOKED": ("JobCancelled", "was revoked"),
    "UNKNOWN": ("JobLost", "is not known to Slurm any more and left no result"),
    "timed out": ("JobTimedOut", "was stopped {stop_before_end_s} s or more before its time limit of {time}; it had no requeue "
                                 "left (requeues = {requeues})"),
    "node lost": ("NodeLost", "lost a node, and had no requeue left (requeues = {requeues})"),
}
_OUT_OF_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill|out of memory", re.I)


class Seen(NamedTuple):
    """What Slurm says of a job."""

    state: str  # as Slurm calls it; UNKNOWN where it has no such job
    reason: str = ""
    nodes: str = ""
    restarts: str = "0"
    exit: str = ""


class End(NamedTuple):
    """How a job ended; with a `name`, papermill gets the message as an error of that name."""

    state: str  # finished, failed, or a key of _ENDS
    name: str = ""  # of the error; empty: the notebook's cells tell it all
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted job, known by its folder alone: `job.json` is ours, `state.json` the job's, the log Slurm's."""

    folder: Path

    @property
    def record(self) -> dict:
        """What was submitted."""
        return json.loads((self.folder / "job.json").read_text())

    def note(self, **more) -> None:
        """Add to what was submitted, or replace some of it: `job_id`, `seen`."""
        write_atomic(self.folder / "job.json", json.dumps(self.record | more, indent=1))

    @property
    def said(self) -> dict:
        """What the job says of itself; {} before it starts."""
        try:
            return json.loads((self.folder / "state.json").read_text())
        except FileNotFoundError:
            return {}

    @property
    def log(self) -> Path:
        """What the job prints, under submitit's name for it; there once the job has started."""
        return self.folder / f"{self.record['job_id']}_0_log.out"

    def log_tail(self, lines: int = 15) -> list[str]:
        """Its last lines; [] before the job has started."""
        try:
            return self.log.read_text(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            return []

    def cancel(self) -> None:
        """Raises ClusterError with Slurm's reason if it refuses."""
        done = subprocess.run(["scancel", self.record["job_id"]], capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"job {self.record['job_id']} could not be cancelled: {done.stderr.strip()}. "
                               f"By hand: scancel {self.record['job_id']}")

    def end(self, seen: Seen | None) -> End | None:
        """How the job ended; None while it goes on, or while nobody can tell."""
        said, record = self.said, self.record
        if (state := said.get("state")) in ("finished", "failed"):
            return End(state)
        if state not in FINAL:
            if seen is None or seen.state not in _ENDS:
                return None
            state = seen.state
            if state in ("FAILED", "CANCELLED", "COMPLETED") and _OUT_OF_MEMORY.search("\n".join(self.log_tail(50))):
                state = "OUT_OF_MEMORY"
        name, message = _ENDS[state]
        words = record["profile"] | {"nodes": said.get("nodes", ""), "exit": seen.exit if seen else ""}
        why = said.get("why", "")
        return End(state, name, f"Slurm job {record['job_id']} {message.format(**words)}" + (f": {why}" if why else ""))


class Watch:
    """Asks Slurm now and then, and settles how a job ended."""

    def __init__(self, job: Job, tell):
        self.job, self.tell = job, tell  # tell(text): what is new
        self.seen: Seen | None = None
        self.ended: float | None = None
        self.next, self.told = 0.0, ""

    def end(self) -> End | None:
        """None while it goes on. The job's own word counts at once; Slurm, asked every `poll_s` s, must say it for a while."""
        if said := self.job.said:
            self._news(said)
        if (end := self.job.end(None)) or time.monotonic() < self.next:
            return end
        self.seen, now = ask_slurm(self.job.record["job_id"]), time.monotonic()
        self.next = now + self.job.record["profile"]["poll_s"]
        self._news(self.job.said)
        if (end := self.job.end(self.seen)) is None:
            self.ended = None
            return None
        self.ended = self.ended or now
        self.next = now + 1
        return end if now - self.ended >= _SETTLE_S else None

    def _news(self, said: dict) -> None:
        if text := status(said, self.seen):
            if text != self.told:
                self.tell(f"job {self.job.record['job_id']} {text}")
            self.told = text


def status(said: dict, seen: Seen | None) -> str:
    """One line: the state, where, why it waits."""
    if seen is None:
        return f"{said['state']} on {said['nodes']}" if said else "submitted"
    state = seen.state.lower()
    where = f" on {seen.nodes}" if seen.nodes else ""
    why = f" ({seen.reason})" if seen.state != "RUNNING" and seen.reason not in ("", "None") else ""
    again = f", start {int(seen.restarts) + 1}" if seen.restarts != "0" else ""
    return f"{state}{where}{why}{again}"


def ask_slurm(job_id: str) -> Seen | None:
    """What Slurm says of a job now; None where it does not answer."""
    try:
        asked = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True, timeout=60)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None
    if asked.returncode:
        return _from_accounting(job_id) if "Invalid job id" in asked.stderr else None
    found = dict(re.findall(r"(\w+)=(\S*)", asked.stdout))
    nodes = found.get("NodeList", "").replace("(null)", "")
    return Seen(found["JobState"], found["Reason"], nodes, found.get("Restarts", "0"), found.get("ExitCode", ""))


def _from_accounting(job_id: str) -> Seen | None:
    if not shutil.which("sacct"):
        return Seen("UNKNOWN")
    command = ["sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,NodeList,ExitCode"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode and "disabled" not in asked.stderr:
        return None
    if not asked.stdout.strip():
        return Seen("UNKNOWN")
    state, nodes, code = asked.stdout.strip().splitlines()[-1].split("|")
    return Seen(state.split()[0], "", nodes, "0", code)  # `CANCELLED by 1000`


def id_of(name: str) -> str | None:
    """The job that carries a name, where the client died before it could note the id."""
    asked = subprocess.run(["squeue", "--me", "-h", "-t", "all", f"--name={name}", "-o", "%i"], capture_output=True, text=True)
    if asked.returncode:
        raise ClusterError(f"Slurm does not answer: {asked.stderr.strip()}")
    return asked.stdout.split()[-1] if asked.stdout.split() else None


def name_of(output: str) -> str:
    """One name for all the jobs that make one output."""
    return f"{Path(output).stem}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


def jobs_of(folder: Path, name: str) -> list[Job]:
    """The jobs that were submitted under a name, oldest first."""
    numbers = sorted(int(path.name) for path in (folder / name).glob("[0-9]*") if (path / "job.json").exists())
    return [Job(folder / name / str(number)) for number in numbers]


def summary(job: Job) -> dict[str, str]:
    """State, nodes, stage, step and tokens/s of a job, as text; what nobody knows is empty."""
    said, record = job.said, job.record
    seen = ask_slurm(record["job_id"]) if record.get("job_id") and said.get("state") not in FINAL else None
    end = job.end(seen)
    state = end.state.lower() if end else status(said, seen) if seen else "Slurm does not answer"
    shown = {"state": state if record.get("job_id") else "not submitted", "nodes": said.get("nodes", ""), "stage": "",
             "step": "", "tokens_per_s": ""}
    return shown | _progress(Path(record["cwd"]) / record["parameters"].get("run_dir", "runs"), record["parameters"].get("arm"))


def _progress(root: Path, arm: str | None) -> dict[str, str]:
    """Of the stage that was last at work, from its folder alone: a recipe may need the hub to be read."""
    places = [*root.glob("*/status.json"), *(root / arm).glob("*/status.json")] if arm else root.glob("**/status.json")
    if not (found := sorted(places, key=lambda path: path.stat().st_mtime)):
        return {}
    status, folder = json.loads(found[-1].read_text()), found[-1].parent
    step = f"{status['step']}/{status['total']}" if status.get("total") else ""
    rate = tokens_per_s(folder)
    return {"stage": folder.name, "step": step, "tokens_per_s": f"{rate:.0f}" if rate else ""}


def tokens_per_s(stage: Path, last: int = 10) -> float | None:
    """Of the last steps of a stage: of completions (GRPO), or of what it trains on. None where no row tells."""
    rows = [row for row in read_rows(stage / "metrics.jsonl")[-last:] if row.get("step_s")]
    if not rows:
        return None
    grpo = yaml.safe_load((stage / "recipe.yaml").read_text()).get("grpo", {})
    completions = grpo.get("group_size", 0) * grpo.get("queries_per_step", 0)
    tokens = [row["completion_tokens"] * completions if "completion_tokens" in row else row.get("tokens") for row in rows]
    known = [each for each in tokens if each is not None]
    return sum(known) / sum(row["step_s"] for row in rows) if len(known) == len(rows) else None
