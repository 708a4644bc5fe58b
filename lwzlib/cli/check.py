"""The command `lwz check gpu`."""

from pathlib import Path
from typing import Annotated

import typer

from lwzlib.base.kit import SMOLLM2
from lwzlib.base.paths import RUNS
from lwzlib.cli.options import CLUSTER, say

app = typer.Typer()
checks = typer.Typer(no_args_is_help=True, help="Try the real thing in small on this machine.")
app.add_typer(checks, name="check", rich_help_panel=CLUSTER)


@checks.callback()
def _group():
    """Keep `gpu` a word of the command, while it is the only one."""


@checks.command()
def gpu(model: Annotated[str, typer.Option(help="As in a recipe: a folder, a kit model, or one on the hub.")] = SMOLLM2,
        folder: Annotated[Path, typer.Option(help="What the runs leave.")] = RUNS / "check-gpu"):
    """Five minutes on a new machine: GRPO steps in each way this machine can write, a kill and a resume, weights, memory,
    tokens a second. Says what it skips. Exit code 1 if something is wrong."""
    from lwzlib.cluster.gpu_check import check_gpu

    raise typer.Exit(int(not check_gpu(folder, model, say)))
