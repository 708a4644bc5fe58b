"""The command `lwz doctor`: what this machine has, what a missing part disables, and how to mend it."""

import importlib.metadata
import shutil

import typer
from rich.markup import escape
from rich.table import Table

from lwzlib.base.kit import PARTS, cache, is_prepared
from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import read_yaml
from lwzlib.cli.options import out

app = typer.Typer()
_PROGRAMS = {"Slurm": "sbatch", "Chromium": "chromium"}


@app.command()
def doctor():
    """Say what is missing, what that disables, and how to mend it. Exit code 1 if the nano recipe cannot run."""
    table, missing, parts = Table("", "part", "found", "without it", "how to mend"), set(), read_yaml(TEXTS / "doctor.yaml")
    for part, (disables, mend) in (parts["needed"] | parts["useful"]).items():
        if place := _place(part):
            table.add_row("ok", part, place, disables, "")
        else:
            missing.add(part)
            table.add_row("--", part, "no", disables, escape(mend))
    out.print(table)
    raise typer.Exit(int(bool(missing & set(parts["needed"]))))


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
