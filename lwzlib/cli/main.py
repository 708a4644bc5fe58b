"""`lwz`: run, stage, status, corpus, recipe, estimate, prepare, doctor, check, write, score, hacks, judge-quality, serve-rm,
curate, figures, export, claims, report, push; generate, judge, aggregate, arena, elo, rate, unblind; jobs, submit."""

import asyncio
import collections
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Column, Table

from lwzlib.base import kit
from lwzlib.base.marks import published_marks
from lwzlib.base.processes import end_rank, end_with_parent
from lwzlib.base.recipe import flatten, load_recipe
from lwzlib.base.rows import read_json, rows_of
from lwzlib.cli import check, doctor, evaluation, exhibits, jobs, push, rewards, write
from lwzlib.cli.options import (
    START,
    TRAIN,
    KeyEnv,
    Overrides,
    Requests,
    RunDir,
    Seed,
    Seeds,
    endpoint,
    out,
    recipe_and_folder,
    resumable,
    say,
    seed_numbers,
)
from lwzlib.data.word_ranges import agreement
from lwzlib.pipeline import notebooks
from lwzlib.pipeline.seeds import run_seeds
from lwzlib.pipeline.stages import run_stage, stage_run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="The LongWriter-Zero reproduction kit.")
for commands in (doctor, write, rewards, evaluation, exhibits, push, jobs, check):
    app.add_typer(commands.app)


@app.command(rich_help_panel=START)
def run(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None, seeds: Seeds = "",
        share: Annotated[str, typer.Option(
            help="With --seeds: stages that the first seed does for all, beside those that no seed changes. With writing-rm or "
                 "cold-start the interval over seeds does not cover what another one would change.")] = ""):
    """Run a recipe whole: every notebook, every arm, a report.

    It goes into a run folder; the same command continues there."""
    loaded, folder = recipe_and_folder(recipe, sets, seed, run_dir)
    if seed and seeds:
        raise typer.BadParameter(f"give --seed {seed} or --seeds {seeds}, not both")
    if share and not seeds:
        raise typer.BadParameter(f"--share {share} needs --seeds")
    with resumable():
        if seeds:
            run_seeds(loaded, folder, seed_numbers(seeds), [name for name in share.split(",") if name], recipe, sets or [])
        else:
            notebooks.run_notebooks(loaded, folder, seed, recipe, sets or [])


@app.command(rich_help_panel=TRAIN)
def stage(name: str, recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None,
          arm: Annotated[str, typer.Option(help="For the stages of an arm.")] = ""):
    """Do one stage, or several (a,b), after those it needs.

    Stages: cold-start, pairs, writing-rm, judge, corpus, distil, pack, pretrain; of an arm: samples-before, grpo or sft,
    samples-during, samples-after."""
    from lwzlib.cluster.readiness import check_stage

    end_with_parent()
    loaded, folder = recipe_and_folder(recipe, sets, seed, run_dir)
    try:
        with resumable():
            for one in name.split(","):
                if not stage_run(one, loaded, folder, seed, arm).finished:
                    check_stage(one, loaded)
                run_stage(one, loaded, folder, seed, arm)
    except typer.Exit as end:
        end_rank(end.exit_code)
        raise
    end_rank()


@app.command(rich_help_panel=START)
def status(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """Show which stages of a run are done, running or to do.

    Also the seconds and the memory that each took. RECIPE may be a run folder, of which it shows what was started."""
    if Path(recipe).is_dir():
        return notebooks.show_stages(Path(recipe), notebooks.stages_found(recipe))
    loaded, folder = recipe_and_folder(recipe, sets, seed, run_dir)
    notebooks.show_stages(folder, notebooks.overview(loaded, folder, seed))


@app.command(rich_help_panel=TRAIN)
def corpus(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """Read, clean, filter and tokenise the recipe's corpus.

    The same command continues where it stopped."""
    loaded, run_folder = recipe_and_folder(recipe, sets, seed, run_dir)
    with resumable():
        folder = run_stage("corpus", loaded, run_folder, seed)
    rows = read_json(folder / "report.json")
    table = Table(*rows[0], title=f"{folder}: documents, and tokens kept")
    for row in rows:
        table.add_row(*map(str, row.values()))
    out.print(table)


@app.command(name="recipe", rich_help_panel=START)
def show_recipe(name: str, sets: Overrides = None,
                every: Annotated[bool, typer.Option("--all", help="Also the quantities that are as in `paper`.")] = False):
    """Show in what a recipe departs from the published setting.

    With the confidence of each published value; --all shows every quantity."""
    loaded = load_recipe(name, sets)
    here, paper = (flatten(known.model_dump(exclude={"arms", "name"})) for known in (loaded, load_recipe("paper")))
    marks, same = published_marks(), [key for key in here if here[key] == paper.get(key)]
    table = Table(Column("quantity", no_wrap=True), Column("here", overflow="fold"), Column("paper", overflow="fold"), "",
                  title=f"recipe {name}", box=box.SIMPLE_HEAD)
    for key, value in here.items():
        if every or key not in same:
            mark, style = marks.get(key, ("",))[0], "dim" if key in same else "bold"
            table.add_row(key, str(value), str(paper.get(key)), mark, style=style)
    out.print(table, "A, B: published. N: not published, chosen by this kit. Reasons: the comments of the recipe's file. " + (
        "Bold: departs from `paper`." if every else f"{len(same)} more quantities are as in `paper`: --all shows them."))


@app.command(rich_help_panel=TRAIN)
def prepare(tiny: Annotated[bool, typer.Option(help="Only the random model for tests.")] = False):
    """Make the embedded models and books, once, in the cache."""
    for name in (kit.TINY,) if tiny else kit.PARTS:
        ready = kit.is_prepared(name)
        folder = kit.prepare(name, lambda line: out.print(f"  {line}", highlight=False))
        say(f"{name}: {'already in' if ready else 'made in'} {folder}")


@app.command(rich_help_panel=TRAIN)
def curate(source: Annotated[str, typer.Argument(help="kit:<name>, a .jsonl file with `query` a line, or hub:<dataset>.")],
           to: Annotated[Path, typer.Argument(help="A .jsonl file; rejects and replies are written beside it.")],
           base_url: Annotated[str, typer.Option(help="OpenAI-compatible, such as http://127.0.0.1:8000/v1.")],
           model: Annotated[str, typer.Option(help="The paper asks QwQ-32B.")],
           api_key_env: KeyEnv = "OPENAI_API_KEY", sets: Requests = None,
           budget_requests: Annotated[int, typer.Option(help="Stop after so many; 0 = no limit.")] = 0,
           budget_tokens: Annotated[int, typer.Option(help="Stop after so many, read and written; 0 = no limit.")] = 0):
    """Keep the queries that need long writing, with word ranges.

    A language model judges them. The same command continues where it stopped."""
    from lwzlib.data import curate as curation

    settings = endpoint(base_url, model, api_key_env, sets, budget_requests=budget_requests, budget_tokens=budget_tokens)
    with resumable():
        kept, rejects = asyncio.run(curation.curate(settings, source, to))
    say(f"{to}: {len(kept)} kept, {len(rejects)} rejected")
    table = Table("rejected because", "queries")
    for reason, count in collections.Counter(row["reason"] for row in rejects).most_common():
        table.add_row(reason, str(count))
    if rejects:
        out.print(table)
    by_hand = {row["id"]: row["word_range"] for _, row in rows_of(source)
               if isinstance(row, dict) and row.get("id") and row.get("word_range")}
    if any(query.id in by_hand for query in kept):
        measures = agreement({query.id: query.word_range for query in kept}, by_hand)
        say("against the ranges in the source:", ", ".join(f"{name} {value:.3g}" for name, value in measures.items()))


def main() -> None:
    """The entry point: a known error is one clear message and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.startswith("lwzlib") or isinstance(error, OSError):
            print(f"lwz: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        raise


if __name__ == "__main__":
    main()
