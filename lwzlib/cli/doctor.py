"""The command `lwz doctor`: what this machine has, what a missing part disables, and how to mend it."""

import importlib.metadata
import shutil

import typer
from rich.markup import escape
from rich.table import Table

from lwzlib.base.kit import LONGBENCH, MINILM, PARTS, SHAKESPEARE, SMOLLM2, THREE_KINGDOMS, cache, is_prepared
from lwzlib.cli.options import out

app = typer.Typer()
_GPU_EXTRA = "pip install -e '.[gpu]'"
_NEEDED = {  # by the nano recipe: {part: (what it disables, how to mend)}
    SMOLLM2: ("nano and laptop recipes, notebooks 00, 03, 04, 05, 06", "lwz prepare"),
    MINILM: ("the semantic half of the format reward", "lwz prepare"),
    SHAKESPEARE: ("English human text for the Writing RM and pretraining", "lwz prepare"),
    THREE_KINGDOMS: ("Chinese human text for the Writing RM and pretraining", "lwz prepare"),
    **dict.fromkeys(("torch", "transformers", "trl", "papermill"), ("everything that trains", "make setup")),
}
_USEFUL = {
    LONGBENCH: ("LongBench-Write", "lwz prepare"),
    "bfloat16": ("speed: models compute in float32 instead, with other last digits", "a GPU, or a CPU with AVX-512 or AMX"),
    "CUDA GPU": ("recipes gpu and paper", "run on a machine with an NVIDIA GPU and its driver"),
    "vllm": ("fast generation in recipes gpu and paper", f"{_GPU_EXTRA} (Linux, GPU)"),
    "deepspeed": ("sharded training of large models", f"{_GPU_EXTRA} (Linux)"),
    "Slurm": ("multi-node jobs", "log in to a Slurm cluster"),
    "Chromium": ("the browser test of the report", "apt-get install chromium"),
}
_PROGRAMS = {"Slurm": "sbatch", "Chromium": "chromium"}


@app.command()
def doctor():
    """Say what is missing, what that disables, and how to mend it. Exit code 1 if the nano recipe cannot run."""
    table, missing = Table("", "part", "found", "without it", "how to mend"), set()
    for part, (disables, mend) in (_NEEDED | _USEFUL).items():
        if place := _place(part):
            table.add_row("ok", part, place, disables, "")
        else:
            missing.add(part)
            table.add_row("--", part, "no", disables, escape(mend))
    out.print(table)
    raise typer.Exit(int(bool(missing & set(_NEEDED))))


def _place(part: str) -> str:
    """Place of a part, or its version; empty if it is missing."""
    if part in PARTS:
        return str(cache()) if is_prepared(part) else ""
    if part in _PROGRAMS:
        return shutil.which(_PROGRAMS[part]) or ""
    try:
        if part not in ("CUDA GPU", "bfloat16"):
            return importlib.metadata.version(part)
        import torch

        from lwzlib.base.fast_cpu import computed_in
    except ImportError:  # also of importlib.metadata: no such package
        return ""
    if part == "bfloat16":
        return "yes" if computed_in("bfloat16") == "bfloat16" else ""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
