"""What made a result: commit, package versions, hardware, time."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

from lwzlib.base.paths import ROOT

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy")


def commit_of(made: dict) -> str | None:
    """The commit of a `provenance.json`, with a + where it is not the whole truth: files were changed, or the run was resumed
    with others."""
    changed = made["uncommitted_changes"] or any(
        later["commit"] != made["commit"] or later["uncommitted_changes"] for later in made.get("resumed", []))
    return f"{made['commit']}+" if made["commit"] and changed else made["commit"]


def provenance() -> dict:
    """What made a result: commit, versions, hardware, time."""
    def git(*words):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    code = ("lwzlib", "recipes", "notebooks", "pyproject.toml", "constraints.txt")  # what can change a result
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", *code)
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"commit": commit, "uncommitted_changes": bool(changes) if commit else None, "versions": versions,
            "python": platform.python_version(), "hardware": hardware(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def hardware() -> str:
    """Processor, cores and GPUs, in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {name}"
    return f"{name}, {os.cpu_count()} cores, no GPU"
