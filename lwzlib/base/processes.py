"""Signals and processes: how a stage is asked to stop, and how it ends with its parent."""

import contextlib
import ctypes.util
import functools
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from lwzlib.base.rows import RunError

INTERRUPTED = 130  # exit code of a stage that was stopped and goes on from its last checkpoint


class Interrupted(RunError):
    """A stage that was asked to stop, and did; the same call goes on from its last checkpoint."""


def main_process() -> bool:
    """Whether this process writes, of those that train together. True where there is but one."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def tcmalloc() -> str:
    """Name under which the loader finds tcmalloc, an allocator that processes which hold a model start with; "" without it."""
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc") or ""


def forget_peak_memory() -> float:
    """Let the peak memory of this process begin anew, where the system has that (most Linux). Returns in GiB the peak that it
    could not forget, of larger work done before; 0 where none is left."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    peak, now = _memory_gib("VmHWM"), _memory_gib("VmRSS")
    return peak if peak > now + 0.05 else 0.0  # just forgotten, the peak is the present memory, counted a little differently


def peak_memory_gib(earlier_gib: float = 0.0) -> float | None:
    """Most memory that this process has had at once (resident, without that of a GPU), in GiB; None where it is not known, or
    not above `earlier_gib`, the peak of `forget_peak_memory`."""
    peak = _memory_gib("VmHWM")
    return peak if peak > earlier_gib else None


def _memory_gib(field: str) -> float:
    """A size from Linux's account of this process; NaN on another system."""
    with contextlib.suppress(OSError):
        size = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(size[1]) / 2**20 if size else math.nan
    return math.nan


def end_with_parent() -> None:
    """Prepare a launched process: it saves and stops when asked to, and ends when the process of LWZ_END_WITH is gone, so that
    a killed notebook leaves nothing running."""
    Stop.listen()
    if parent := int(os.environ.get("LWZ_END_WITH", "0")):
        end_with(parent)


def end_with(parent: int) -> None:
    """End this process when `parent` is no longer its parent: nothing goes on writing after a kill."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_rank(code: int = 0) -> None:
    """End this process if it is one of many that train together: after its work, threads of torch or DeepSpeed may abort it.
    An interrupted one ends with 0: at any other code srun and torchrun would kill the ranks that still save."""
    if "RANK" in os.environ:
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if code == INTERRUPTED else code)


class Stop:
    """SIGUSR1 or SIGUSR2, before a time limit: what trains saves and stops after its step (`asked`), all else stops at once."""

    asked = training = False

    @classmethod
    def listen(cls) -> None:
        """Take the signals from now on; Python allows it in the main thread alone."""
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, cls._come)

    @classmethod
    def _come(cls, *_) -> None:
        cls.asked = True
        if not cls.training:
            raise KeyboardInterrupt
