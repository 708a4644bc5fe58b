"""What the files of commands share: options, the console, and the end of a command that was interrupted."""

import contextlib
import functools
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lwzlib.base.processes import INTERRUPTED
from lwzlib.base.recipe import Recipe, load_recipe, merge, parse_overrides
from lwzlib.pipeline.stages import run_folder

out = Console()
say = functools.partial(out.print, highlight=False, soft_wrap=True)  # a line of text as it is
# Groups of commands in `lwz --help`, in their order
START, TRAIN, JUDGE, EVALUATE, EXHIBITS, CLUSTER = (
    "Start here", "Prepare and train", "Rewards and judges", "Evaluate", "Exhibits and models", "Cluster and GPU")
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", help="name=value, such as grpo.steps=5; repeatable")]
Seed = Annotated[int, typer.Option(help="Every random choice follows from it.")]
RunDir = Annotated[Path | None, typer.Option(help="Default: runs/<recipe>, or runs/<recipe>-seed<n>.")]
Seeds = Annotated[str, typer.Option(help="Several, such as 0-7 or 0,2,5: the folder is that of seed 0, and <folder>-seed<n> "
                                         "that of another.")]
KeyEnv = Annotated[str, typer.Option(help="Name of the variable that holds the key.")]
Requests = Annotated[list[str] | None, typer.Option(
    "--set", "-s", help="Of the requests: concurrency=64, budget_requests=1000, sampling.temperature=0, ...; repeatable")]


def recipe_and_folder(recipe: str, sets: list[str] | None, seed: int, run_dir: Path | None) -> tuple[Recipe, Path]:
    """The recipe with its changes, and its run folder."""
    loaded = load_recipe(recipe, sets)
    return loaded, run_dir or run_folder(loaded, seed)


def endpoint(base_url: str, model: str, api_key_env: str, sets: list[str] | None, **more):
    """Settings of a language model behind an address; `sets` win, laid over each other in their order: `sampling.top_p=1` and
    `sampling={top_p: 1}` are the same. Raises LLMError for a wrong one."""
    from lwzlib.endpoints import llm

    settings = {"base_url": base_url, "model": model, "api_key_env": api_key_env} | more
    for name, value in parse_overrides(sets).items():
        for section in reversed(name.split(".")):
            value = {section: value}
        settings = merge(settings, value)
    return llm.configure(**settings)


@contextlib.contextmanager
def resumable():
    """Turn Ctrl-C into one line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is lost: the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def seed_numbers(seeds: str) -> list[int]:
    """Numbers of `0-7` or `0,2,5`, or both. Raises typer.BadParameter for anything else."""
    numbers: list[int] = []
    for part in seeds.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise typer.BadParameter(f"--seeds {seeds}: {part!r} must be a number, or two that rise, such as 0-7")
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers):
        raise typer.BadParameter(f"--seeds {seeds}: a seed comes twice")
    return numbers
