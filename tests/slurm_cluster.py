"""A real Slurm on this machine, for a block of code: munged, slurmctld, and two nodes with a slurmd each.

A node is a network namespace behind a bridge, with its own host name: its 127.0.0.1 is not the other's, as on a cluster. As on
Debian, a node's own name is 127.0.1.1 to itself, and there is no way to the outside.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from polling import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "ip", "nsenter", "unshare")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct")
PARTITION = "cpu"
NODES = ("node1", "node2")
_CONF = """ClusterName=lwz
SlurmctldHost={host}({net}.1)
SlurmUser=root
SlurmctldPort={ctld_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
{accounting}
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=20
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
MinJobAge=300
EnforcePartLimits=ALL
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
GresTypes=gpu
NodeName=node1 NodeAddr={net}.11 CPUs=8 RealMemory=32000 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeAddr={net}.12 CPUs=8 RealMemory=32000 Gres=gpu:2 State=UNKNOWN
NodeName=node3 NodeAddr={net}.13 CPUs=8 RealMemory=32000 State=DOWN Reason="the power supply burnt"
PartitionName={partition} Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=node[1-2] MaxTime=10 State=UP
PartitionName=broken Nodes=node3 MaxTime=INFINITE State=UP
PartitionName=members Nodes=node[1-2] AllowAccounts=members State=UP
"""


_DBD_CONF = """AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=root
StorageLoc=accounts
"""


def missing(accounting: bool = False) -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid():
        return "needs root, to start Slurm's daemons and to make network namespaces"
    absent = [program for program in PROGRAMS + ACCOUNTING * accounting if not shutil.which(program, path=_path())]
    packages = "slurmctld slurmd slurm-client munge iproute2" + " slurmdbd mariadb-server" * accounting
    return f"needs {', '.join(absent)} (apt-get install {packages})" if absent else ""


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, env=os.environ | {"PATH": _path()})
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclasses.dataclass
class Cluster:
    folder: Path
    name: str  # of its bridge and, with the number of the node, of its network namespaces
    net: str  # the first three numbers of its addresses
    dbd_port: int = 0
    database: dict[str, str | int] = dataclasses.field(default_factory=dict)  # options of MariaDB
    daemons: dict[str, subprocess.Popen] = dataclasses.field(default_factory=dict)

    def start(self, name: str) -> None:
        """munged, slurmctld, or the slurmd of a node."""
        if name == "munged":
            command = ["munged", "--foreground", "--force", *(f"--{kind}={self.folder}/munge.{end}" for kind, end in (
                ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed")))]
        elif name in ("slurmctld", "slurmdbd"):
            command = [name, "-D"]
        elif name == "mariadbd":
            command = ["mariadbd", "--no-defaults", "--user=root", "--skip-grant-tables", "--bind-address=127.0.0.1",
                       *(f"--{key}={value}" for key, value in self.database.items())]
        else:
            inside = f"hostname {name} && mount --bind {self.folder}/hosts-{name} /etc/hosts && exec slurmd -D -N {name}"
            command = ["nsenter", f"--net=/run/netns/{self._namespace(name)}", "unshare", "-m", "-u", "sh", "-c", inside]
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=os.environ | {"PATH": _path()}, stdout=log, stderr=log)

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        daemon = self.daemons.pop(name)
        daemon.send_signal(how)
        daemon.wait(30)

    def crash(self, node: str) -> None:
        """All that runs on the node dies at once, and it answers nobody; `start` boots it again."""
        _ip("link", "set", self._port(node), "down")
        for pid in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait(30)

    def forget(self, meanwhile=lambda: None) -> None:
        """The controller is killed, and comes back without memory of any job."""
        self.stop("slurmctld", signal.SIGKILL)
        meanwhile()
        for path in (self.folder / "state").iterdir():
            path.unlink() if path.is_file() else None
        self.start("slurmctld")

    def boot(self, node: str) -> None:
        _ip("link", "set", self._port(node), "up")
        self.start(node)

    def processes(self, node: str) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self._namespace(node)).split()]

    def _namespace(self, node: str) -> str:
        return f"{self.name}-{node}"

    def _port(self, node: str) -> str:
        return f"{self.name}-{node[-1]}"

    def wire(self) -> None:
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.net}.1/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        for number, node in enumerate(NODES, 1):
            space, port = self._namespace(node), self._port(node)
            _ip("netns", "add", space)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", port, "master", self.name, "up")
            _ip("-n", space, "addr", "add", f"{self.net}.{10 + number}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", space, "link", "set", device, "up")

    def unwire(self) -> None:
        for node in NODES:
            _ip("netns", "delete", self._namespace(node), check=False)
            _ip("link", "delete", self._port(node), check=False)
        _ip("link", "delete", self.name, check=False)


@contextlib.contextmanager
def running(folder: Path, accounting: bool = False):
    """Sets SLURM_CONF for everything that is started inside. Skips the test without Slurm, unless LWZ_REQUIRE_SLURM is set."""
    if why := missing(accounting):
        assert not os.environ.get("LWZ_REQUIRE_SLURM"), f"CI must have Slurm: {why}"
        pytest.skip(f"Slurm: {why}")
    folder.chmod(0o755)
    cluster = Cluster(folder, f"lwz{os.getpid()}", f"10.{77 + os.getpid() // 250 % 100}.{os.getpid() % 250}")
    _configure(cluster, accounting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            cluster.wire()
            cluster.start("munged")
            until(lambda: (folder / "munge.socket").exists(), "munged", 20)
            if accounting:
                _account(cluster)
            for daemon in ("slurmctld", *NODES):
                cluster.start(daemon)
            until(lambda: idle() == set(NODES), "the nodes", 60)
            yield cluster
        finally:
            subprocess.run(["scancel", "--user", "root"], capture_output=True)
            with contextlib.suppress(AssertionError):
                until(lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout, "the end of the jobs", 20)
            for name in reversed(list(cluster.daemons)):
                cluster.stop(name)
            cluster.unwire()


def idle() -> set[str]:
    """The nodes that wait for work."""
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%N %T"], capture_output=True, text=True)
    return {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" idle")}


def _account(cluster: Cluster) -> None:
    """MariaDB, and Slurm's daemon before it."""
    cluster.database["datadir"] = str(cluster.folder / "database")
    subprocess.run(["mariadb-install-db", "--no-defaults", f"--datadir={cluster.database['datadir']}", "--skip-test-db",
                    "--auth-root-authentication-method=normal"], check=True, capture_output=True)
    for daemon, port in (("mariadbd", int(cluster.database["port"])), ("slurmdbd", cluster.dbd_port)):
        cluster.start(daemon)
        until(lambda port=port: _answers(port), daemon, 60)
    done = subprocess.run(["sacctmgr", "--immediate", "add", "cluster", "lwz"], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _configure(cluster: Cluster, accounting: bool) -> None:
    folder, host, ports = cluster.folder, socket.gethostname().split(".")[0], _free_ports(4)
    kept = (f"accounting_storage/slurmdbd\nAccountingStorageHost=localhost\nAccountingStoragePort={ports[2]}\n"
            f"AccountingStoragePass={folder}/munge.socket")
    (folder / "slurm.conf").write_text(_CONF.format(
        folder=folder, host=host, net=cluster.net, partition=PARTITION, ctld_port=ports[0], node_port=ports[1],
        accounting=f"AccountingStorageType={kept if accounting else 'accounting_storage/none'}"))
    if accounting:
        cluster.dbd_port = ports[2]
        cluster.database = {"port": ports[3], "socket": f"{folder}/sql.socket", "pid-file": f"{folder}/sql.pid"}
        (folder / "slurmdbd.conf").write_text(_DBD_CONF.format(folder=folder, dbd_port=ports[2], sql_port=ports[3]))
        (folder / "slurmdbd.conf").chmod(0o600)
    devices = folder / "devices"  # what looks like GPUs to Slurm
    devices.mkdir()
    for number in range(2):
        os.mknod(devices / f"nvidia{number}", 0o20666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName=node[1-2] Name=gpu File={devices}/nvidia[0-1] "
                                      "Flags=nvidia_gpu_env\n")
    addresses = {"localhost": "127.0.0.1", host: f"{cluster.net}.1"} | {
        node: f"{cluster.net}.{10 + number}" for number, node in enumerate(NODES, 1)}
    for node in NODES:
        hosts = addresses | {node: "127.0.1.1"}
        (folder / f"hosts-{node}").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
