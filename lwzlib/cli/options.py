"""What the files of commands share: options, the console, and the end of a command that was interrupted."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lwzlib.base.processes import INTERRUPTED

out = Console()
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", help="name=value, such as grpo.steps=5; repeatable")]
Seed = Annotated[int, typer.Option(help="Every random choice follows from it.")]
RunDir = Annotated[Path | None, typer.Option(help="Default: runs/<recipe>, or runs/<recipe>-seed<n>.")]


@contextlib.contextmanager
def resumable():
    """Turn Ctrl-C into one line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is lost: the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
