"""The command `lwz doctor`: what this machine has, what a missing part disables, how to mend it; whether a recipe can run."""

import contextlib
import importlib.metadata
import os
import shutil
from typing import Annotated

import psutil
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from lwzlib.base.kit import PARTS, cache, is_prepared
from lwzlib.base.paths import TEXTS
from lwzlib.base.processes import tcmalloc
from lwzlib.base.recipe import load_recipe, presets
from lwzlib.base.rows import read_yaml
from lwzlib.cli.options import START, Overrides, out, say

app = typer.Typer()
_PROGRAMS = {"Slurm": "sbatch", "Chromium": "chromium"}


@app.command(rich_help_panel=START)
def doctor(recipe: Annotated[str | None, typer.Argument(help="Check what this one needs.")] = None,
           sets: Overrides = None):
    """Say what this machine can run, and what is missing.

    What a missing part disables, and how to get it. With RECIPE: whether it can run (launch: slurm: on the nodes that the
    profile asks for). Exit code 1 if it cannot; without RECIPE, if nano cannot."""
    if recipe:
        raise typer.Exit(int(not _can_run(recipe, sets)))
    table, missing, parts = Table("", "part", "found", box=box.SIMPLE_HEAD), set(), read_yaml(TEXTS / "doctor.yaml")
    for part, (affects, mend) in (parts["needed"] | parts["useful"]).items():
        if place := _place(part):
            table.add_row("ok", part, place)
        else:
            missing.add(part)
            table.add_row("--", part, escape(f"missing; affects {affects}\nto mend it: {mend}"))
    out.print(table)
    if unmet := [part for part in parts["needed"] if part in missing]:
        say(f"This machine cannot run recipe nano before it has {', '.join(unmet)}.", markup=False)
        raise typer.Exit(1)
    runnable, takes = _runnable(), parts["recipes"]
    named = ", ".join(f"{name} ({takes[name]})" if name in takes else name for name in runnable)
    say(f"This machine (cores: {os.cpu_count()}, memory: {psutil.virtual_memory().total / 2**30:.0f} GiB) can run "
        f"{named or 'no recipe'}. `lwz doctor <recipe>` says why another cannot run.", markup=False)
    raise typer.Exit(int("nano" not in runnable))


def _runnable() -> list[str]:
    """Presets that this machine can run; none for Slurm where its profile is wrong. Main memory is not checked."""
    from lwzlib.cluster import readiness
    from lwzlib.cluster.profile import ClusterError

    names, checks = [], set(readiness.CHECKS) - set(readiness.HARMLESS)
    for name in presets():
        recipe = load_recipe(name)
        with contextlib.suppress(ClusterError):
            if not readiness.reasons(recipe, readiness.place_of(recipe), checks):
                names.append(name)
    return names


def _can_run(name: str, sets: list[str] | None) -> bool:
    """Show each check of a recipe, and in one line whether it can run."""
    from lwzlib.cluster import readiness

    recipe, table, why = load_recipe(name, sets), Table("", "check", "what is wrong", box=box.SIMPLE_HEAD), []
    place = readiness.place_of(recipe)
    for check, look in readiness.CHECKS.items():
        reason = look(recipe, place)
        table.add_row("" if reason is None else "--" if reason else "ok", check, escape(reason or ""))
        why += [reason] if reason and check not in readiness.HARMLESS else []
    out.print(table)
    say(f"recipe {name} " + (f"cannot run here: {'; '.join(why)}" if why else "can run here"), markup=False)
    return not why


def _place(part: str) -> str:
    """Place of a part, or its version; empty if it is missing."""
    if part in PARTS:
        return str(cache()) if is_prepared(part) else ""
    if part == "tcmalloc":
        return tcmalloc()
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
