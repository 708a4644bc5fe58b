"""Stages, started by name: in this process, in one of their own, or in many; started processes end with this one.

An interrupt ends what was started. In a Slurm job it means that time is nearly over: a process that trains saves first.
"""

import codecs
import collections
import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from lwzlib.base.processes import INTERRUPTED, Interrupted, tcmalloc
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, write_atomic
from lwzlib.base.run_folder import Run
from lwzlib.pipeline import ranks, vllm_servers
from lwzlib.pipeline.stages import STAGES, Work, arm_stages, needs, run_stage, stage_run

_QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
# glibc gives large blocks back to the system at once; every decoding step on a CPU then asks for them anew. tcmalloc keeps
# them, and needs fewer; where it cannot be preloaded after all, in a container say, glibc's settings hold.
_KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
_GPU_DRIVER = Path("/dev/nvidiactl")  # torch, which knows too, takes seconds to load
_POLL_S = 0.05


def of_processes() -> dict[str, str]:
    """Environment of processes that hold a model. OpenMP threads spin while they wait: a short while is enough, and leaves the
    cores to others. Without a GPU they keep the memory that they free; beside one, others need it: offloaded weights, say."""
    if _GPU_DRIVER.exists():
        return {"GOMP_SPINCOUNT": "10000"}
    return {"GOMP_SPINCOUNT": "10000"} | _KEEPS_MEMORY | (preloading(allocator) if (allocator := tcmalloc()) else {})


def preloading(library: str) -> dict[str, str]:
    """Environment of processes that load the library before any other, and then what this one was told to."""
    others = [other for other in os.environ.get("LD_PRELOAD", "").split(":") if other not in ("", library)]
    return {"LD_PRELOAD": ":".join([library, *others])}


def launch(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Run:
    """Start a stage as the recipe says, show its lines, and return its Run when it is finished.

    `launch` of the recipe: inline (in this process), subprocess, torchrun (`distributed.processes` on this machine) or slurm
    (on each node of the allocation); the last two spread the stages that train and start what they need first, and so does a
    subprocess where vLLM is colocated.
    Raises RunError with the last lines of a process that failed, Interrupted where one was asked to stop. An interrupt ends
    the processes, inside a Slurm job after a checkpoint; the next call resumes.
    """
    run = stage_run(stage, recipe, root, seed, arm)
    if run.finished:
        print(f"{stage} of {arm or 'all arms'}: already done in {run.folder}")
    elif recipe.launch == "inline":
        run_stage(stage, recipe, root, seed, arm)
    elif _shares_process(recipe):
        _do(stage_command(stage, recipe, root, seed, arm, run.folder), [run])
    else:
        models = {name: launch(name, recipe, root, seed, of).folder / "model" for name, of in needs(stage, recipe, arm)}
        start = Work(run, arm, models).start
        with contextlib.ExitStack() as around:
            spreads = STAGES[stage].spreads and recipe.launch != "subprocess"
            spread = around.enter_context(vllm_servers.ready(stage, run, arm, start)) if spreads else (None, _one_gpu(stage))
            _do(stage_command(stage, recipe, root, seed, arm, run.folder), [run], *spread)
    return run


def _one_gpu(stage: str) -> dict[str, str]:
    """Environment of a stage that is one process: TRL refuses to train in one that sees several GPUs; what writes takes all."""
    return {"CUDA_VISIBLE_DEVICES": first_gpu()} if stage == "cold-start" else {}


def first_gpu() -> str:
    """The first GPU that processes started from here see, as CUDA_VISIBLE_DEVICES names it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _shares_process(recipe: Recipe) -> bool:
    """Whether one subprocess does several stages. A process can have one colocated vLLM, for which TRL makes it a rank."""
    return recipe.launch == "subprocess" and recipe.vllm.mode != "colocate"


def launch_arm(recipe: Recipe, root: str | Path, seed: int, arm: str) -> dict[str, Run]:
    """`launch` of all stages of an arm (`arm_stages`), by name. Those that can share a subprocess: each start costs seconds."""
    runs = {stage: stage_run(stage, recipe, root, seed, arm) for stage in arm_stages(recipe, arm)}
    unfinished = [stage for stage, run in runs.items() if not run.finished]
    if unfinished and _shares_process(recipe):
        command = stage_command(",".join(unfinished), recipe, root, seed, arm, runs[unfinished[0]].folder)
        _do(command, [runs[stage] for stage in unfinished])
    else:
        for stage in runs:
            launch(stage, recipe, root, seed, arm)
    return runs


def stage_command(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str, folder: Path) -> list[str]:
    """The command that does the stage, or several (a,b); the recipe lies in the run's folder, which all nodes see."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "asked.yaml", recipe.model_dump_json())  # JSON is YAML too
    return [sys.executable, "-m", "lwzlib.cli.main", "stage", stage, str((folder / "asked.yaml").resolve()), "--run-dir",
            str(Path(root).resolve()), "--seed", str(seed), *(["--arm", arm] if arm else [])]


def _do(command: list[str], runs: list[Run], world: ranks.World | None = None, env: dict[str, str] | None = None) -> None:
    """Do what the command does for these runs, one after the other, and print its output. With a `world`, every rank does it,
    and the output is that of rank 0. Raises Interrupted or RunError."""
    logs, said = runs[0].folder / "logs", collections.deque[str](maxlen=1_000)
    env = os.environ | of_processes() | _QUIET | {"LWZ_END_WITH": str(os.getpid())} | (env or {})
    with contextlib.ExitStack() as opened:
        shown: dict[io.FileIO, bool] = {}  # whether what comes there is printed
        if world:
            command, of_ranks = ranks.in_every_rank(world, command, logs)
            env |= of_ranks
            (logs / "rank-000.log").write_bytes(b"")  # without what an earlier start wrote
            shown[opened.enter_context((logs / "rank-000.log").open("rb", buffering=0))] = True
        process = opened.enter_context(subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
            start_new_session=True))  # Ctrl-C in a terminal or in Jupyter reaches it through `_end` alone
        assert isinstance(process.stdout, io.FileIO)
        os.set_blocking(process.stdout.fileno(), False)
        shown[process.stdout] = not world or world.slurm  # not torchrun's table of failures: `_check` sums it up
        show = functools.partial(_show_until_end, process, shown, said)
        try:
            show()
        except KeyboardInterrupt:
            _end(process, show, world)
            raise
    _check(process.returncode, runs, "".join(said), world)


def _show_until_end(process: subprocess.Popen, shown: dict[io.FileIO, bool], said: collections.deque[str]) -> None:
    """Read the streams until the process has ended, and print what comes in those that are `shown`; its end stays in `said`."""
    decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in shown}
    ended = False
    while not ended:
        ended = process.poll() is not None
        for stream, decoder in decoders.items():
            while chunk := stream.read(65_536):
                said.append(decoder.decode(chunk))
                if shown[stream]:
                    print(said[-1], end="", flush=True)
        time.sleep(0 if ended else _POLL_S)


def _end(process: subprocess.Popen, show: Callable[[], None], world: ranks.World | None) -> None:
    """Stop a stage. In a Slurm job an interrupt says that the time ends: the stage saves first; a second one stops it now."""
    for number in [signal.SIGUSR1] * ("SLURM_JOB_ID" in os.environ) + [signal.SIGINT]:
        if number == signal.SIGUSR1 and world and not world.slurm:  # srun hands it to the ranks; torchrun would die of it
            with contextlib.suppress(psutil.NoSuchProcess):
                for rank in psutil.Process(process.pid).children():
                    rank.send_signal(number)
        else:
            process.send_signal(number)
        try:
            return show()
        except KeyboardInterrupt:
            continue


def _check(code: int, runs: list[Run], said: str, world: ranks.World | None) -> None:
    """Raise RunError or Interrupted if the processes ended with another exit code than 0, or before the runs were finished."""
    run = next((run for run in runs if not run.finished), runs[-1])  # where it stopped
    if code == INTERRUPTED or (not code and not run.finished):
        raise Interrupted(f"the stage was asked to stop, and did after step {run.status.get('checkpoint_step', 0)}; the same "
                          "call goes on from there")
    if code:
        if run.status.get("state") in ("running", "interrupted"):  # its main process was ended with the others
            run.update(state="failed")
        failed = world and ranks.failure(world, said, run.folder / "logs")
        last = "\n".join(said.splitlines()[-30:])
        raise RunError(f"the stage ended with exit code {code}; " + (failed or f"its last lines:\n{last}"))
