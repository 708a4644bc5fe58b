"""vLLM for GRPO: colocated with the trainer, or as servers on nodes of their own, as TRL 1.16 wants them; and, in both cases,
servers on all nodes for the stages that only write.

TRL talks to one `vllm serve`, so the servers' nodes form one: the first answers HTTP, the others are headless, and each copy
of the model is a data-parallel rank of it; TRL's rank 0 broadcasts new weights to all of them over NCCL. The server listens
on the address by which the other nodes reach its own and, because weights must come in, with vLLM's development endpoints:
inside an allocation only.

On CPU vLLM cannot take new weights: here what it writes for a stage is tested, and of GRPO its commands, the waiting and the
stopping.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from lwzlib.base.models import resolve
from lwzlib.base.parallel import _PORT, URL, accumulation, context_tokens
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.pipeline import ranks

_POLL_S = 0.5
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment cannot reach a job's nodes
_TRAINS = ["--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]


@contextlib.contextmanager
def ready(stage: str, run: Run, arm: str, model: str) -> Iterator[tuple[ranks.World, dict[str, str]]]:
    """Where a stage's ranks run, and what to add to their environment. For `grpo` with vLLM servers these answer, and are
    stopped at the end. Raises RunError before anything is started."""
    recipe, logs = run.recipe, run.folder / "logs"
    served = stage == "grpo" and recipe.vllm.mode == "server"
    at = ranks.world(recipe, served)
    if stage == "grpo":
        accumulation(recipe, at.size)
    at = ranks.meet(at)
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as around:
        yield at, around.enter_context(serve(recipe, at, logs, resolve(model), _longest(recipe, arm, model))) if served else {}


def _longest(recipe: Recipe, arm: str, model: str) -> int:
    """Tokens of the longest training prompt of an arm with its completion."""
    from lwzlib.base.models import load_tokenizer
    from lwzlib.method.queries import load_queries
    from lwzlib.method.samples import framed_queries

    tokenizer = load_tokenizer(model, recipe.model.trust_remote_code)
    queries = load_queries(recipe.data.train, recipe.data.languages)
    prompts = framed_queries(recipe, queries, recipe.arm(arm).prompt, tokenizer)
    return context_tokens(prompts, tokenizer, recipe.grpo.sampling.max_new_tokens)


def everywhere(recipe: Recipe) -> ranks.World:
    """vLLM on all nodes of the recipe: nobody trains meanwhile. Raises RunError outside an allocation that is large enough."""
    at = ranks.world(recipe)
    return dataclasses.replace(at, hosts=at.hosts[:1], servers=at.hosts)


def program() -> str:
    """vLLM's command: `vllm` on PATH, else the one beside this Python, whose folder need not be on PATH."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.exists() and not shutil.which("vllm") else "vllm"


def scores(identity: str) -> list[str]:
    """Options of vLLM for a Writing RM, which is served under its identity."""
    return ["--runner", "pooling", "--served-model-name", identity]


def commands(recipe: Recipe, at: ranks.World, model: str, longest_tokens: int, trains: bool = True,
             more: Sequence[str] = ()) -> list[list[str]]:
    """`vllm serve` for each server node, the one that answers HTTP first, for prompts and completions of up to
    `longest_tokens` together; it takes new weights if a model `trains`. `more`: other options of vLLM."""
    vllm, (head, _) = recipe.vllm, at.reached_at[at.servers[0]]
    local = recipe.distributed.processes // vllm.tensor_parallel
    common = [
        program(), "serve", model, "--host", head, "--port", str(at.port + 3), "--dtype", recipe.model.dtype,
        "--tensor-parallel-size", str(vllm.tensor_parallel), "--gpu-memory-utilization", str(vllm.memory_share),
        "--data-parallel-size", str(local * len(at.servers)), "--data-parallel-size-local", str(local),
        "--data-parallel-address", head, "--data-parallel-rpc-port", str(at.port + 4),
        "--max-model-len", str(longest_tokens),
        "--generation-config", "vllm",  # not the model's own, which may cap completions: the recipe says how they are drawn
        *_TRAINS * trains, *more, *["--trust-remote-code"] * recipe.model.trust_remote_code]
    return [common + (["--headless", "--data-parallel-start-rank", str(node * local)] if node else [])
            for node in range(len(at.servers))]


@contextlib.contextmanager
def serve(recipe: Recipe, at: ranks.World, logs: Path, model: str, longest_tokens: int, trains: bool = True,
          more: Sequence[str] = ()) -> Iterator[dict]:
    """Start the servers, wait until they answer, yield what the ranks need to know, stop them. Raises RunError with the
    end of a server's log if it dies or does not answer within `distributed.start_s`."""
    logs.mkdir(parents=True, exist_ok=True)
    url, running = f"http://{at.reached_at[at.servers[0]][0]}:{at.port + 3}", []
    settings = at.unproxied() | ({"VLLM_SERVER_DEV_MODE": "1"} if trains else {})
    try:
        for host, command in zip(at.servers, commands(recipe, at, model, longest_tokens, trains, more), strict=True):
            log = logs / f"vllm-{'trains' if trains else 'scores' if more else 'writes'}-{host}.log"
            with log.open("wb") as file:
                running.append((log, subprocess.Popen(
                    [*(ranks.srun([host]) if at.slurm else ranks.WITH_US), *command], stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, env=os.environ | settings | at.settings(host), start_new_session=True)))
        _wait(url, running, recipe.distributed.start_s)
        print(f"vLLM answers at {url}, {len(at.servers)} nodes", flush=True)
        yield {URL: url, _PORT: str(at.port + 2)}
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its engines, too: they hold the GPU
                process.wait()


def _wait(url: str, running: list, patience_s: int) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        for log, process in running:
            if process.poll() is not None:
                raise RunError(f"a vLLM server ended with exit code {process.returncode} before it answered; the end of "
                               f"{log}:\n{ranks.tail(log)}")
        with contextlib.suppress(OSError), _DIRECT.open(f"{url}/health", timeout=5):
            return
        if time.monotonic() > deadline:
            raise RunError(f"vLLM does not answer at {url}/health within distributed.start_s = {patience_s} s; the end of "
                           f"{running[0][0]}:\n{ranks.tail(running[0][0])}")
        time.sleep(_POLL_S)
