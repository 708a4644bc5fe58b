"""A stage in many processes: where they run, what starts them, and which of them failed first.

Published: 8 nodes of 8 H800. How the work was spread is not; here TRL's trainers run under accelerate, with DeepSpeed's ZeRO
where the recipe asks for it. On Slurm `srun` starts one task per GPU, on one machine torchrun does; either ends all ranks when
one fails. Every rank sees all GPUs of its node and has a log of its own; rank 0 alone writes rows and status.

Two things are our own, because neither engine has them: `meet` names a node that cannot be reached, for which torch would wait
half an hour, and brings back the address of each; `failure` puts what the engine says of the first failing rank together with
the traceback in that rank's log.
"""

import contextlib
import dataclasses
import os
import platform
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError

_PORTS = 5  # of a job: rendezvous, `meet`, vLLM's weights, its server, its engines
_MEET_S = 50  # for the nodes of an allocation to reach each other
_GRACE_S = 10  # for ranks that were asked to end
WITH_US = ("setpriv", "--pdeathsig", "TERM")  # a command that ends when its parent does
# A shell gives a rank what its engine does not, and becomes the rank. Without its engine it ends (`end_with_parent`).
_SRUN_RANK = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LWZ_END_WITH=$PPID; exec "$@"'
# torchrun's --log-dir would put output and errors apart, into folders of random names.
_TORCHRUN_RANK = 'export LWZ_END_WITH=$PPID; exec "$@" > "$LWZ_LOGS/rank-$(printf %03d $RANK).log" 2>&1'
# What the engines say of the rank that failed first.
_SRUN_SAYS = re.compile(r"^srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)\S*: (?:Exited with exit code )?(?P<how>.+)$", re.M)
_TORCHRUN_SAYS = re.compile(r"Root Cause.*?^  rank +: (?P<rank>\d+).*?^  exitcode +: (?P<how>-?\d+)", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class World:
    """Who trains: `processes` on each of `hosts`, rank 0 on the first; `servers` are the hosts of vLLM. `port` and the next
    four are free on the first host, as far as can be known. `reached_at`: (address, interface) by which the others reach a
    host, as `meet` found them: to a host itself, its name may be a loopback address."""

    hosts: list[str]
    processes: int
    port: int
    servers: list[str] = dataclasses.field(default_factory=list)
    slurm: bool = False
    reached_at: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """Hosts of both kinds."""
        return list(dict.fromkeys([*self.hosts, *self.servers]))

    def settings(self, host: str) -> dict[str, str]:
        """Environment that a host's processes need: else vLLM seeks a way to the outside, and gloo takes the host's name."""
        address, interface = self.reached_at[host]
        return {"VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", interface)}

    def unproxied(self) -> dict[str, str]:
        """Environment in which no HTTP between the nodes goes through the proxy that the environment may name."""
        known = urllib.request.getproxies().get("no", "")
        addresses = [address for address, _ in self.reached_at.values()]
        ours = ",".join(dict.fromkeys([*filter(None, known.split(",")), "localhost", "127.0.0.1", *self.nodes, *addresses]))
        return dict.fromkeys(("no_proxy", "NO_PROXY"), known if known == "*" else ours)

    @property
    def size(self) -> int:
        """Number of processes that train together; servers are not counted."""
        return len(self.hosts) * self.processes


def world(recipe: Recipe, served: bool = False) -> World:
    """Where the recipe's processes go; if `served`, the last nodes are left to vLLM. Raises RunError outside an allocation,
    or in one that is too small."""
    where, vllm = recipe.distributed, recipe.vllm
    if recipe.launch != "slurm":
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


def in_every_rank(at: World, command: list[str], logs: Path) -> tuple[list[str], dict[str, str]]:
    """The command that runs `command` in every rank of the world, and what it needs in its environment. The logs are
    `rank-000.log` and so on; with the first rank that fails, or with this process, all ranks end."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, _cores(at.slurm) // at.processes)))
    env = at.unproxied() | {
        "OMP_NUM_THREADS": threads, "LWZ_LOGS": str(logs.resolve()),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning")}  # DeepSpeed's, at every step
    if at.slurm:
        address, _ = at.reached_at[at.hosts[0]]
        env |= {"MASTER_ADDR": address, "MASTER_PORT": str(at.port), "LOCAL_WORLD_SIZE": str(at.processes)}
        output = f"--output={str(logs.resolve()).replace('%', '%%')}/rank-%3t.log"
        own = [f"{host}) export {shlex.join(map('='.join, at.settings(host).items()))};;" for host in at.hosts]
        shell = ["sh", "-c", f"case $SLURMD_NODENAME in {' '.join(own)} esac; {_SRUN_RANK}", "rank"]
        return [*srun(at.hosts, at.processes, output, "--open-mode=truncate"), *shell, *command], env
    return [*WITH_US, sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={at.processes}",
            f"--master-addr={at.hosts[0]}", f"--master-port={at.port}", "--monitor-interval=0.05",
            f"--shutdown-timeout={_GRACE_S}", "--no-python", "sh", "-c", _TORCHRUN_RANK, "rank", *command], env


def _cores(slurm: bool) -> int:
    """Number of cores of each node: of a Slurm job's part of it, on the node where that is smallest ("96(x3),64")."""
    per_node = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_JOB_CPUS_PER_NODE", "")) if slurm else []
    return min(map(int, per_node), default=os.cpu_count() or 1)


def srun(hosts: list[str], tasks: int = 1, *options: str) -> list[str]:
    """The start of a command that runs as `tasks` tasks on each host, inside the allocation and the job's container, beside
    other steps. A task sees all GPUs of its node and has its share of the cores. All end when one fails, or when we do."""
    cores = _cores(slurm=True)
    return [*WITH_US, "srun", "--overlap", "--quit-on-interrupt", "--unbuffered", "--kill-on-bad-exit=1", "--wait=0",
            "--export=ALL", "--distribution=block", f"--nodes={len(hosts)}", f"--ntasks={len(hosts) * tasks}",
            f"--ntasks-per-node={tasks}", f"--cpus-per-task={max(1, cores // tasks)}", *["--overcommit"] * (tasks > cores),
            f"--nodelist={','.join(hosts)}", *options, *shlex.split(os.environ.get("LWZ_CONTAINER", ""))]


def failure(at: World, said: str, logs: Path) -> str:
    """The first rank that failed, how, and the end of its log; "" if `said`, the engine's words, names none."""
    first = (_SRUN_SAYS if at.slurm else _TORCHRUN_SAYS).search(said)
    if not first:
        return ""
    signals = {signal.strsignal(number): f"-{number}" for number in signal.valid_signals()}
    rank, how = int(first["rank"]), signals.get(first["how"], first["how"])
    host, log = first["host"] if at.slurm else platform.node(), logs / f"rank-{rank:03d}.log"
    end = f", by signal {how[1:]}" if how.startswith("-") else f", with exit code {how}" if how.isdigit() else f": {how}"
    return f"rank {rank} of {at.size} on {host} ended first{end} (log: {log}); its last lines:\n{tail(log)}"


def tail(path: Path, lines: int = 40) -> str:
    """The end of a log, from its last traceback on if it has one there."""
    last = path.read_bytes()[-20_000:].decode(errors="replace").splitlines()[-lines:] if path.exists() else []
    starts = [i for i, line in enumerate(last) if line.startswith("Traceback")]
    return "\n".join(last[starts[-1] :] if starts else last)


def meet(at: World) -> World:
    """The world with the addresses of all its nodes, once every node has reached the first one over the network. Raises
    RunError that names those which do not within a minute."""
    head, port, nodes = at.hosts[0], str(at.port + 1), at.nodes
    if len(nodes) == 1:
        return dataclasses.replace(at, reached_at={head: ("127.0.0.1", "lo")})
    command = ["timeout", "--kill-after=2", str(_MEET_S + 6), *srun(nodes), sys.executable, "-m", "lwzlib.pipeline.ranks",
               head, port, str(len(nodes)), str(_MEET_S)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    reached_at = {name: (address, interface)
                  for name, address, interface in re.findall(r"^(\S+) (\S+) (\S+)$", done.stdout, re.M)}
    if away := [node for node in nodes[1:] if node not in reached_at]:
        raise RunError(f"of {len(nodes)} nodes, {', '.join(away)} did not reach {head}:{port} within {_MEET_S} s; "
                       f"srun said:\n{done.stderr.strip()}")
    return dataclasses.replace(at, reached_at=reached_at)


def meet_here(head: str, port: int, nodes: int, patience_s: float) -> None:
    """The task of `meet` on a node: print the node's name, address and interface once it reaches the first, which listens
    until all have come. Raises SystemExit."""
    number, name, deadline = os.environ["SLURM_PROCID"], os.environ["SLURMD_NODENAME"], time.monotonic() + patience_s
    if number == "0":
        missing = {str(other).encode() for other in range(1, nodes)}
        with socket.create_server(("", port)) as server:
            while missing:  # `meet` ends it
                with contextlib.suppress(OSError), server.accept()[0] as line:
                    line.settimeout(5)
                    if (other := line.recv(9)) in missing:  # else a stranger, who may come another way
                        _print_own_end(name, line)
                        line.sendall(other)
                        missing.remove(other)
    while number != "0":
        try:
            with socket.create_connection((head, port), timeout=5) as line:
                line.sendall(number.encode())
                if not line.recv(9):
                    raise ConnectionError("it gives no answer")
                return _print_own_end(name, line)
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"{name} cannot reach the head node at {head}:{port} within {patience_s:g} s: {error}")
        time.sleep(0.05)


def _print_own_end(node: str, line: socket.socket) -> None:
    """Print a node's name, and the address and interface of its end of a connection."""
    address = line.getsockname()[0]
    interface = next(name for name, ends in psutil.net_if_addrs().items() if address in [end.address for end in ends])
    os.write(1, f"{node} {address} {interface}\n".encode())  # in one piece: srun mixes what its tasks write


if __name__ == "__main__":
    meet_here(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
