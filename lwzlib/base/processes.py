"""Signals and processes: how a stage is asked to stop, and how it ends with its parent."""

import os
import signal
import threading
import time

from lwzlib.base.rows import RunError

INTERRUPTED = 130  # exit code of a stage that was stopped and goes on from its last checkpoint


def end_with_parent() -> None:
    """In a launched process: leave when the parent is gone, so that a killed notebook leaves nothing running; save and stop
    when asked to."""
    Stop.listen()
    if parent := int(os.environ.get("LWZ_END_WITH", "0")):
        end_with(parent)


class Interrupted(RunError):
    """A stage that was asked to stop, and did; the same call goes on from its last checkpoint."""


def main_process() -> bool:
    """Of the processes that train together, this one writes. True where there is but one."""
    return os.environ.get("RANK", "0") == "0"


def end_with(parent: int) -> None:
    """Leave this process when `parent` is no longer its parent: nothing goes on writing after a kill."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Stop:
    """SIGUSR1, before a time limit: what trains saves and stops after its step (`asked`), all else stops at once."""

    asked = training = False

    @classmethod
    def listen(cls) -> None:
        """Take SIGUSR1 from now on; Python allows it in the main thread alone."""
        signal.signal(signal.SIGUSR1, cls._come)

    @classmethod
    def _come(cls, *_) -> None:
        cls.asked = True
        if not cls.training:
            raise KeyboardInterrupt
