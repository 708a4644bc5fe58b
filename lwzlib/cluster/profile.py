"""A site profile: what one cluster wants of a job, and the batch script that asks for it (submitit writes and submits it).

`cluster_jobs/profiles/<name>.yaml` states a site, checked as strictly as a recipe. One string names the profile and what this
job changes in it: `"generic nodes=8 time=2-00:00:00"`. It comes from the engine's option `profile` or the variable
LWZ_PROFILE; without either, `site.yaml` (yours, not committed) is taken if there is one, else `generic`.
"""

import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import submitit
import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from lwzlib.base.paths import CLUSTER_JOBS, WORK
from lwzlib.base.quantities import Count, Positive, Section, nearest_name
from lwzlib.base.recipe import RecipeError, parse_overrides, read_extending

PROFILES = CLUSTER_JOBS / "profiles"
_CACHES = {"HF_HOME": "huggingface", "LWZ_CACHE": "lwz", "VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton",
           "TORCHINDUCTOR_CACHE_DIR": "inductor"}
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_ON_EACH_NODE = "srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --overlap"


class ClusterError(RuntimeError):
    """A job that cannot run, or cannot be watched; the message says why and what to do."""


class Profile(Section):
    """One job on one site. Amounts are per node."""

    partition: str | None  # none: the site's default
    account: str | None
    qos: str | None
    nodes: Positive
    gpus_per_node: Count
    gpu: Literal["h800", "h100", "h200", "a100"] | None  # the recipe must fit on it, before submission; none: not checked
    gres: str | None  # where the site wants gpu:h100:8 instead of a number of GPUs
    cpus_per_node: Positive
    memory_gb_per_node: Count  # 0: all that the node has
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]
    stop_before_end_s: Positive  # the notebook is interrupted so long before the time limit, to write its checkpoint
    requeues: Count  # how often the job may start again, after its time limit or the loss of a node
    sbatch: dict[str, str | int | bool]  # further options: {constraint: h100, exclusive: true}
    modules: list[str]
    setup: list[str]  # further lines of the script, before the notebook
    environment: dict[str, str]
    container: str | None  # what stands before a command: apptainer exec --nv image.sif
    python: str | None  # on the nodes; none: the Python that submits
    scratch: str | None  # of each node: TMPDIR is made below it, and removed at the end
    cache: str | None  # models, data sets and compiled kernels, shared by all nodes
    offline: bool  # the nodes reach no model hub
    jobs: str  # what the jobs leave; must be shared by all nodes. Below the repository, unless absolute
    poll_s: Positive  # how often Slurm is asked

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value):
        if isinstance(value, int):  # YAML reads 12:00:00 in base 60
            raise ValueError('put the time in quotes: "12:00:00"')
        return value

    @property
    def minutes(self) -> int:
        """`time` in minutes, as submitit wants it; seconds count as one more."""
        days, rest = self.time.split("-") if "-" in self.time else ("0", self.time)
        hours, minutes, seconds = map(int, rest.split(":"))
        return (int(days) * 24 + hours) * 60 + minutes + (seconds > 0)

    @property
    def jobs_folder(self) -> Path:
        """Folder of all jobs: `jobs`, beside the runs unless absolute."""
        return WORK / self.jobs

    def __str__(self) -> str:
        """Short account of what the job asks for, for an error of Slurm."""
        gpus = self.gres or (f"{self.gpus_per_node} GPUs" if self.gpus_per_node else "no GPU")
        memory = f"{self.memory_gb_per_node} GB" if self.memory_gb_per_node else "all memory"
        return (f"partition {self.partition or 'by default'}, account {self.account or 'by default'}, {self.nodes} x "
                f"[{gpus}, {self.cpus_per_node} CPUs, {memory}], {self.time}")


def profile_names() -> list[str]:
    """Names of the committed profiles, and `site` if there is one."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(choice: str | None = None) -> Profile:
    """The profile that a string names, with its changes. Raises ClusterError for an unknown name, key or value."""
    try:
        name, *words = shlex.split(choice or os.environ.get("LWZ_PROFILE", "")
                                   or ("site" if "site" in profile_names() else "generic"))
        changes = parse_overrides(words)
        if "time" in changes:  # as it was typed: YAML reads 12:00:00 in base 60
            changes["time"] = dict(word.split("=", 1) for word in words)["time"]
    except (RecipeError, ValueError) as error:
        raise ClusterError(f"profile {choice!r}: {error}") from None
    tree = read_extending(name, _profile_path, "profile", ClusterError, yaml.SafeLoader, operator.or_)
    for key, value in changes.items():
        table, _, inner = key.partition(".")
        if inner and table in ("sbatch", "environment"):
            key, value = table, tree.get(table, {}) | {inner: value}
        tree[key] = value
    try:
        profile = Profile.model_validate(tree)
    except ValidationError as error:
        raise ClusterError(f"profile {name}: " + "; ".join(map(_explain, error.errors()))) from None
    if 60 * profile.minutes <= profile.stop_before_end_s:
        raise ClusterError(f"profile {name}: time = {profile.time} must be longer than stop_before_end_s = "
                           f"{profile.stop_before_end_s} s, or the notebook is interrupted as soon as it starts")
    return profile


def _profile_path(source: str) -> Path:
    path = Path(source).expanduser() if source.endswith((".yaml", ".yml")) else PROFILES / f"{source}.yaml"
    if not path.exists():
        raise ClusterError(f"no profile {source!r}{nearest_name(source, profile_names())}; there are "
                           f"{', '.join(profile_names())}, or give a path that ends in .yaml")
    return path


def _explain(problem: ErrorDetails) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"no key {name!r}{nearest_name(name, Profile.model_fields)}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    return f"{name} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"


class _Executor(submitit.SlurmExecutor):
    """submitit's executor, for a command instead of a pickled function, so that the script alone starts the job again."""

    @classmethod
    def affinity(cls) -> int:
        """submitit refuses a machine without Slurm at 0 and below; a script can be shown there too."""
        return 1


def _command(profile: Profile, folder: Path) -> str:
    """The last line of the script. `exec`: the batch shell becomes the notebook's process, which so gets Slurm's signals."""
    python = [*shlex.split(profile.container or ""), profile.python or sys.executable]
    return shlex.join(["exec", *python, "-u", "-m", "lwzlib.cluster.in_job", str(folder)])


def _executor(profile: Profile, folder: Path, name: str) -> _Executor:
    executor = _Executor(folder)
    optional = {key: value for key in ("partition", "account", "qos", "gres") if (value := getattr(profile, key))}
    if profile.gpus_per_node and not profile.gres:
        optional["gpus_per_node"] = profile.gpus_per_node
    executor.update_parameters(
        job_name=name, time=profile.minutes, nodes=profile.nodes, ntasks_per_node=1, cpus_per_task=profile.cpus_per_node,
        mem=f"{profile.memory_gb_per_node}G" if profile.memory_gb_per_node else "0", wckey=None, use_srun=False,
        stderr_to_stdout=True, setup=_setup(profile), **optional,
        additional_parameters={"requeue" if profile.requeues else "no-requeue": True,
                               "signal": f"B:USR2@{profile.stop_before_end_s}"} | profile.sbatch)
    return executor


def _setup(profile: Profile) -> list[str]:
    """Lines of the script before the notebook. `srun` takes the cores of a task from SRUN_CPUS_PER_TASK."""
    variables = {key: f"{profile.cache}/{folder}" for key, folder in _CACHES.items()} if profile.cache else {}
    variables |= dict.fromkeys(_OFFLINE, "1") if profile.offline else {}
    variables |= {"LWZ_CONTAINER": profile.container} if profile.container else {}
    lines = ["module purge", *(f"module load {shlex.quote(name)}" for name in profile.modules)] if profile.modules else []
    lines += ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in (variables | profile.environment).items()]
    if profile.scratch:
        lines += [f"export TMPDIR={shlex.quote(profile.scratch)}/lwz-$SLURM_JOB_ID", f'{_ON_EACH_NODE} mkdir -p "$TMPDIR"']
    return lines + profile.setup


def batch_script(profile: Profile, folder: Path, name: str) -> str:
    """The batch script, exactly as `submit_job` hands it to Slurm."""
    return _executor(profile, folder, name)._make_submission_file_text(_command(profile, folder), "")


def submit_job(profile: Profile, folder: Path, name: str) -> str:
    """Submit the job; its id. Raises ClusterError with Slurm's reason."""
    try:
        return _executor(profile, folder, name)._submit_command(_command(profile, folder)).job_id
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise ClusterError(f"Slurm refuses the job ({profile}): {error}") from None


def check_job(profile: Profile, folder: Path, name: str) -> None:
    """Ask Slurm whether it would take the job, without submitting it. Raises ClusterError with Slurm's reason."""
    if not shutil.which("sbatch"):
        raise ClusterError("this machine has no sbatch: start from a login node of the cluster, or leave out --engine slurm")
    try:
        answer = run_command("sbatch", "--test-only", input=batch_script(profile, folder, name), timeout=120)
    except subprocess.TimeoutExpired:
        raise ClusterError("Slurm did not answer within 120 s; nothing was submitted") from None
    if not answer.returncode:
        return
    lines = [re.sub(r"^(sbatch: )?(error: )?(allocation failure: )?", "", line) for line in answer.stderr.splitlines()]
    reasons = dict.fromkeys(filter(None, lines))  # each once
    partition = ["-p", profile.partition] if profile.partition else []
    unusable = run_command("sinfo", "-h", "-R", "-o", "%N is %T (%E)", *partition)  # nodes, and why
    nodes = unusable.stdout.splitlines()[:5] if not unusable.returncode else []
    raise ClusterError(f"Slurm refuses the job ({profile}): {'; '.join([*reasons, *nodes])}. Nothing was submitted")


def run_command(*command: str, **options) -> subprocess.CompletedProcess[str]:
    """A finished command of Slurm, with what it printed. Raises TimeoutExpired after `timeout` s."""
    return subprocess.run(command, capture_output=True, text=True, **options)
