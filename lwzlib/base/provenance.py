"""What made a result: commit, package versions, hardware, time."""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lwzlib.base.paths import CHECKOUT, ROOT

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy")
_CODE = ("lwzlib", "recipes", "notebooks", "pyproject.toml", "constraints.txt")  # what can change a result


def commit_of(made: dict) -> str | None:
    """The commit of a `provenance.json`, with a + where it is not the whole truth: files were changed, or the run was resumed
    with others."""
    changed = made["uncommitted_changes"] or any(
        later["commit"] != made["commit"] or later["uncommitted_changes"] for later in made.get("resumed", []))
    return f"{made['commit']}+" if made["commit"] and changed else made["commit"]


def provenance() -> dict:
    """The content of a new `provenance.json`; commit and changes are None where they are not known. Where the kit is installed,
    the commit is the one that pip recorded (`pip install git+...`), never that of a repository around it."""
    commit, changes = _installed_commit(), None
    if CHECKOUT:
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no", "--", *_CODE)
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"commit": commit, "uncommitted_changes": bool(changes) if commit else None, "versions": versions,
            "python": platform.python_version(), "hardware": hardware(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _installed_commit() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        origin = importlib.metadata.distribution("lwzlib").read_text("direct_url.json")
        return json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    return None


def _git(*words: str) -> str | None:
    if not _git_installed():
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _git_installed() -> bool:
    """Whether git is on PATH; says once what a machine without it costs."""
    if not shutil.which("git"):
        print("git is not installed: the commit that makes these results stays unknown", file=sys.stderr, flush=True)
        return False
    return True


def hardware() -> str:
    """Processor, cores and GPUs, in words; and the format that models are computed in, where the machine has no bfloat16."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            name = match[1]
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {name}"

        from lwzlib.base.fast_cpu import computed_in

        if computed_in("bfloat16") == "float32":
            name += " without bfloat16: computed in float32"
    return f"{name}, {os.cpu_count()} cores, no GPU"
