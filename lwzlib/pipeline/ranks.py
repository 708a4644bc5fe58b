"""A stage in many processes: where they run, who starts them, and what is shown when one dies.

Published: 8 nodes of 8 H800. How the work was spread is not; here TRL's trainers run under accelerate, with DeepSpeed's ZeRO
where the recipe asks for it. On each node an agent (this module, as a program) starts one process a GPU with the variables
that torch reads (RANK, MASTER_ADDR, ...), as torchrun does. It is not torchrun, because a stage must save before a time
limit: the agent passes SIGUSR1 on to every rank, where torchrun would die of it. On a Slurm allocation `srun` starts the
agents. Rank 0 alone writes rows and status; every rank has a log of its own in the run folder.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from lwzlib.base.processes import INTERRUPTED, end_with
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, write_atomic

_PORTS = 5  # of a job: rendezvous, health check, vLLM's weights, its server, its engines
_MEET_S = 60  # for the nodes of an allocation to reach each other
_SAVE_S = 900  # for the other ranks, when the first has saved and stopped: rank 0 may still write
_GRACE_S = 10  # for ranks that were asked to end
_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class World:
    """Who trains: `processes` on each of `hosts`, rank 0 on the first; `servers` are the hosts of vLLM. `port` and the next
    four are free on the first host, as far as can be known."""

    hosts: list[str]
    processes: int
    port: int
    servers: list[str] = dataclasses.field(default_factory=list)
    slurm: bool = False

    @property
    def size(self) -> int:
        """Processes that train together; servers are not counted."""
        return len(self.hosts) * self.processes


def world(recipe: Recipe, served: bool = False) -> World:
    """Where the recipe's processes go; if `served`, the last nodes are left to vLLM. Raises RunError outside an allocation,
    or in one that is too small."""
    where, vllm = recipe.distributed, recipe.vllm
    if recipe.launch == "torchrun":
        return World(["127.0.0.1"], where.processes, _free_ports())
    hosts, job = allocated(), os.environ["SLURM_JOB_ID"]
    if len(hosts) < where.nodes:
        raise RunError(f"distributed.nodes = {where.nodes}, and Slurm job {job} has {len(hosts)}: {', '.join(hosts)}")
    training = where.nodes - (vllm.nodes if served else 0)
    return World(hosts[:training], where.processes, job_port(job), hosts[training : where.nodes], slurm=True)


def allocated() -> list[str]:
    """Names of the nodes of this Slurm job, in Slurm's order. Raises RunError outside one."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise RunError("launch: slurm needs a Slurm allocation: submit the notebook with --engine slurm, or start inside "
                       "sbatch or salloc; without a cluster, launch=torchrun")
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    if done.returncode or not done.stdout.split():
        raise RunError(f"scontrol cannot name the nodes {nodes}: {done.stderr.strip()}")
    return done.stdout.split()


def _free_ports() -> int:
    """The first of five neighbouring ports that are free on this machine now, below those that Linux gives to clients."""
    while True:
        first = random.SystemRandom().randrange(10_000, 30_000, _PORTS)
        with contextlib.suppress(OSError), contextlib.ExitStack() as around:
            for port in range(first, first + _PORTS):
                around.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def job_port(job: str) -> int:
    """The first of a job's ports: below the ports that Linux gives to clients, the same on every node."""
    return 10_000 + int(job) % 4_000 * _PORTS


def agents(at: World, logs: Path) -> list[str]:
    """What to put before a command to run it in every process of the world; it ends when all of them have ended."""
    agent = [sys.executable, "-m", "lwzlib.pipeline.ranks", "--head", at.hosts[0], "--port", str(at.port), "--nodes",
             str(len(at.hosts)), "--processes", str(at.processes), "--logs", str(logs.resolve()), "--"]
    return (srun(at.hosts) if at.slurm else []) + agent


def srun(hosts: list[str]) -> list[str]:
    """One task on each host, inside the allocation and the job's container, beside other steps; all end when one fails, or when
    we do."""
    return ["setpriv", "--pdeathsig", "TERM", "srun", "--overlap", "--quit-on-interrupt", "--unbuffered",
            "--kill-on-bad-exit=1", "--distribution=block", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}",
            "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}", *shlex.split(os.environ.get("LWZ_CONTAINER", ""))]


def failure(logs: Path) -> str:
    """The first rank that failed, with its traceback; "" if none did."""
    found = sorted((json.loads(path.read_text()) for path in logs.glob("failed-*.json")), key=lambda each: each["at"])
    return f"{found[0]['what']}; its last lines:\n{found[0]['said']}" if found else ""


def tail(path: Path, lines: int = 40) -> str:
    """The end of a log, from its last traceback on if it has one there."""
    last = path.read_bytes()[-20_000:].decode(errors="replace").splitlines()[-lines:] if path.exists() else []
    starts = [i for i, line in enumerate(last) if line.startswith("Traceback")]
    return "\n".join(last[starts[-1] :] if starts else last)


def meet(head: str, port: int, node: int, nodes: int, patience_s: float) -> None:
    """Every node reaches the head, or RunError says within `patience_s` who does not."""
    deadline = time.monotonic() + patience_s
    if node:
        while True:
            try:
                with socket.create_connection((head, port), timeout=5) as line:
                    line.sendall(f"{node} {socket.gethostname()}".encode())
                    line.shutdown(socket.SHUT_WR)
                    line.settimeout(max(1.0, deadline - time.monotonic()))
                    if line.recv(2) == b"ok":
                        return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RunError(f"node {node} ({socket.gethostname()}) cannot reach the head node at {head}:{port} within "
                                   f"{patience_s:g} s: {error}") from None
            time.sleep(_POLL_S)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port)))
        came: dict[int, socket.socket] = {}
        while len(came) < nodes - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                line = stack.enter_context(server.accept()[0])
            except TimeoutError:
                away = sorted(set(range(1, nodes)) - set(came))
                raise RunError(f"of {nodes} nodes, node {', '.join(map(str, away))} did not reach {head}:{port} within "
                               f"{patience_s:g} s") from None
            line.settimeout(5)
            with contextlib.suppress(OSError, ValueError):
                came[int(line.recv(300).split()[0])] = line
        for line in came.values():
            line.sendall(b"ok")


def leave(code: int = 0) -> None:
    """A rank leaves its group and ends here: after its work is done, threads of torch or DeepSpeed may abort it at its end."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Agent:
    """Starts the ranks of one node and ends them together."""

    def __init__(self, node: int, options: argparse.Namespace):
        self.node, self.options, self.ranks = node, options, {}
        self.ending: float | None = None

    def start(self) -> None:
        """One process a GPU, with torch's variables and a log of its own; rank 0 is shown too. Raises OSError."""
        o, size = self.options, self.options.nodes * self.options.processes
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // o.processes)))
        for local in range(o.processes):
            rank = self.node * o.processes + local
            env = {"PYTHONWARNINGS": "ignore::FutureWarning"} | os.environ | {  # DeepSpeed's, at every step
                "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(o.processes),
                "MASTER_ADDR": o.head, "MASTER_PORT": str(o.port), "OMP_NUM_THREADS": threads, "LWZ_END_WITH": str(os.getpid())}
            with self.log(rank).open("wb") as log:
                self.ranks[rank] = subprocess.Popen(
                    o.command, env=env, stdin=subprocess.DEVNULL, stdout=log if rank else subprocess.PIPE,
                    stderr=subprocess.STDOUT, start_new_session=True)
            if rank == 0:
                self.echo = threading.Thread(target=self.show, args=(self.ranks[0].stdout, self.log(0)))
                self.echo.start()

    def show(self, stream, path: Path) -> None:
        """Copy what rank 0 says, line by line, into its log and to our own output; runs in a thread."""
        with path.open("wb", buffering=0) as log:
            for line in stream:
                log.write(line)
                print(line.decode(errors="replace"), end="", flush=True)

    def log(self, rank: int) -> Path:
        """`rank-000.log` and so on, in the folder that `--logs` names."""
        return self.options.logs / f"rank-{rank:03d}.log"

    def signal(self, number: int) -> None:
        """To each rank of this node that still runs."""
        for process in self.ranks.values():
            if process.poll() is None:
                process.send_signal(number)

    def end(self, *_) -> None:
        """Ask the ranks to stop, once; `wait` kills those that do not."""
        if self.ending is None or self.ending > time.monotonic():
            self.ending = time.monotonic()
            self.signal(signal.SIGINT)

    def wait(self) -> int:
        """0 if every rank ended well, else the code of the first that did not, the others ended."""
        code = 0
        while any(process.poll() is None for process in self.ranks.values()):
            bad = next(((rank, p.returncode) for rank, p in self.ranks.items() if p.poll() not in (None, 0)), None)
            if bad and not code:
                code = self.report(*bad)
            if self.ending and time.monotonic() > self.ending + _GRACE_S:
                self.signal(signal.SIGKILL)
            time.sleep(_POLL_S)
        late = next(((rank, p.returncode) for rank, p in self.ranks.items() if p.returncode), None)
        if late and not code:
            code = self.report(*late)
        return code

    def report(self, rank: int, code: int) -> int:
        """Remember the first rank that failed, and end the others. An interrupted rank did not fail: all are stopping."""
        if code in (INTERRUPTED, -signal.SIGUSR1) or self.ending:
            self.ending = self.ending or time.monotonic() + _SAVE_S
            return INTERRUPTED
        what = f"rank {rank} of {self.options.nodes * self.options.processes} on {socket.gethostname()} ended first, " + (
            f"by signal {-code}" if code < 0 else f"with exit code {code}") + f" (log: {self.log(rank)})"
        write_atomic(self.options.logs / f"failed-{self.node}.json",
                     json.dumps({"at": time.time(), "what": what, "said": tail(self.log(rank))}))
        print(f"{what}; the other ranks are ended", flush=True)
        self.end()
        return code if code > 0 else 1


def main() -> int:
    """The agent of one node: exit code of its first rank that failed, or 0."""
    parser = argparse.ArgumentParser(description="Start the ranks of this node; see lwzlib.pipeline.ranks.")
    parser.add_argument("--head", required=True)
    parser.add_argument("--logs", required=True, type=Path)
    for name in ("--port", "--nodes", "--processes"):
        parser.add_argument(name, required=True, type=int)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    if parent := int(os.environ.get("LWZ_END_WITH", "0")) if options.nodes == 1 and "SLURM_STEP_ID" not in os.environ else 0:
        end_with(parent)
    node = int(os.environ.get("SLURM_PROCID", "0")) if options.nodes > 1 else 0
    agent = Agent(node, options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, agent.end)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: agent.signal(signal.SIGUSR1))
    try:
        if options.nodes > 1:
            meet(options.head, options.port + 1, node, options.nodes, _MEET_S)
        agent.start()
    except (RunError, OSError) as error:
        print(f"lwz: {error}", flush=True)
        agent.end()
        return 1
    return agent.wait()


if __name__ == "__main__":
    sys.exit(main())
