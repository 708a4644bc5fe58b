"""What this machine has, what a missing part disables, and how to mend it."""

import dataclasses
import importlib.metadata
import shutil

from lwzlib.base.kit import LONGBENCH, MINILM, SHAKESPEARE, SMOLLM2, THREE_KINGDOMS, cache, is_prepared

_PARTS = {
    SMOLLM2: "nano and laptop recipes, notebooks 00, 03, 04, 05, 06",
    MINILM: "the semantic half of the format reward",
    SHAKESPEARE: "English human text for the Writing RM and pretraining",
    THREE_KINGDOMS: "Chinese human text for the Writing RM and pretraining",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """`found` is empty if the part is missing; `needed` parts are those that the nano recipe cannot do without."""

    part: str
    found: str
    disables: str
    mend: str
    needed: bool = False


def examine() -> list[Check]:
    """Every part that the kit can use, found or not."""
    found = [Check(name, str(cache()) if is_prepared(name) else "", disables, "lwz prepare", True)
             for name, disables in _PARTS.items()]
    for package in ("torch", "transformers", "trl", "papermill"):
        found.append(Check(package, _version(package), "everything that trains", "make setup", True))
    found += [
        Check(LONGBENCH, str(cache()) if is_prepared(LONGBENCH) else "", "LongBench-Write",
              "lwz prepare"),
        Check("CUDA GPU", _gpu(), "recipes gpu and paper", "run on a machine with an NVIDIA GPU and its driver"),
        Check("vllm", _version("vllm"), "fast generation in recipes gpu and paper", "pip install -e '.[gpu]' (Linux, GPU)"),
        Check("deepspeed", _version("deepspeed"), "sharded training of large models", "pip install -e '.[gpu]' (Linux)"),
        Check("Slurm", shutil.which("sbatch") or "", "multi-node jobs", "log in to a Slurm cluster"),
        Check("Chromium", shutil.which("chromium") or "", "the browser test of the report", "apt-get install chromium"),
    ]
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu() -> str:
    try:
        import torch
    except ImportError:
        return ""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
