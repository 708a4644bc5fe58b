"""`lwz`: run, stage, status, corpus, recipe, estimate, prepare, doctor, check, write, score, hacks, judge-quality, serve-rm,
curate, figures, export, claims, report, push; generate, judge, aggregate, arena, elo, rate, unblind; jobs, submit."""

import asyncio
import collections
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from lwzlib.base import kit
from lwzlib.base.marks import published_marks
from lwzlib.base.processes import end_rank, end_with_parent
from lwzlib.base.recipe import flatten, load_recipe
from lwzlib.base.rows import read_json, rows_of
from lwzlib.cli import check, doctor, evaluation, exhibits, jobs, push, rewards, write
from lwzlib.cli.options import (
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
for commands in (evaluation, exhibits, jobs, rewards, doctor, check, push, write):
    app.add_typer(commands.app)


@app.command()
def run(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None, seeds: Seeds = "",
        share: Annotated[str, typer.Option(
            help="With --seeds: stages that the first seed does for all, beside those that no seed changes. With writing-rm or "
                 "cold-start the interval over seeds does not cover what another one would change.")] = ""):
    """Execute the notebooks of a recipe in order, into its run folder; running it again continues."""
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


@app.command()
def stage(name: str, recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None,
          arm: Annotated[str, typer.Option(help="For the stages of an arm.")] = ""):
    """Do one stage here (or several: a,b), after those it needs: cold-start, pairs, writing-rm, judge, corpus, distil, pack,
    pretrain; of an arm: samples-before, grpo or sft, samples-during, samples-after."""
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


@app.command()
def status(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """The arms and stages of a run: what is done, running, to do, and how long each took. RECIPE may be a run folder, of which
    it shows what was started."""
    if Path(recipe).is_dir():
        return notebooks.show_stages(Path(recipe), notebooks.stages_found(recipe))
    loaded, folder = recipe_and_folder(recipe, sets, seed, run_dir)
    notebooks.show_stages(folder, notebooks.overview(loaded, folder, seed))


@app.command()
def corpus(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """Read, clean, filter and tokenise the recipe's corpus; the same command goes on where it stopped."""
    loaded, run_folder = recipe_and_folder(recipe, sets, seed, run_dir)
    with resumable():
        folder = run_stage("corpus", loaded, run_folder, seed)
    rows = read_json(folder / "report.json")
    table = Table(*rows[0], title=f"{folder}: documents, and tokens kept")
    for row in rows:
        table.add_row(*map(str, row.values()))
    out.print(table)


@app.command(name="recipe")
def show_recipe(name: str, sets: Overrides = None):
    """Show a recipe beside the published setting, with the confidence of each published value."""
    loaded = load_recipe(name, sets)
    here, paper = (flatten(known.model_dump(exclude={"arms"})) for known in (loaded, load_recipe("paper")))
    marks = published_marks()
    table = Table(Column("quantity", no_wrap=True), Column("here", overflow="fold"), Column("paper", overflow="fold"), "",
                  "note", title=f"recipe {name}")
    for key, value in here.items():
        mark, note = marks.get(key, ("", ""))
        published = paper.get(key)
        table.add_row(key, str(value), str(published), mark, note, style="bold" if value != published else "dim")
    out.print(table, "Bold: departs from the paper. A, B: published. N: not published, chosen by this kit.")


@app.command()
def estimate(recipe: str, sets: Overrides = None,
             nodes: Annotated[int | None, typer.Option(help="Default: distributed.nodes of the recipe.")] = None,
             gpus: Annotated[int | None, typer.Option(help="A node; default: distributed.processes of the recipe.")] = None,
             gpu: Annotated[str, typer.Option(help="h800, h100, h200 or a100.")] = "h800",
             gpu_gib: Annotated[float | None, typer.Option(help="Memory of a GPU, where it is another.")] = None,
             mean_tokens: Annotated[float | None, typer.Option(help="Of a completion; default: half of the most.")] = None):
    """Memory of a GPU in each stage that trains, disk, and seconds and GPU-hours of GRPO, with the arithmetic. Exit code 1 for
    a recipe that cannot fit."""
    from lwzlib.cluster.plan_pages import planned, show_plan

    plan = planned(recipe, sets, nodes, gpus, gpu, gpu_gib, mean_tokens)
    reasons = show_plan(plan, out)
    for reason in reasons:
        print(f"lwz: recipe {recipe} cannot run on {plan.gpus} x {plan.gpu.name}: {reason}", file=sys.stderr)
    raise typer.Exit(int(bool(reasons)))


@app.command()
def prepare(tiny: Annotated[bool, typer.Option(help="Only the random model for tests.")] = False):
    """Make the embedded models and books once, in the cache: download, check, convert."""
    for name in (kit.TINY,) if tiny else kit.PARTS:
        ready = kit.is_prepared(name)
        folder = kit.prepare(name, lambda line: out.print(f"  {line}", highlight=False))
        say(f"{name}: {'already in' if ready else 'made in'} {folder}")


@app.command()
def curate(source: Annotated[str, typer.Argument(help="kit:<name>, a .jsonl file with `query` a line, or hub:<dataset>.")],
           to: Annotated[Path, typer.Argument(help="A .jsonl file; rejects and replies are written beside it.")],
           base_url: Annotated[str, typer.Option(help="OpenAI-compatible, such as http://127.0.0.1:8000/v1.")],
           model: Annotated[str, typer.Option(help="The paper asks QwQ-32B.")],
           api_key_env: KeyEnv = "OPENAI_API_KEY", sets: Requests = None,
           budget_requests: Annotated[int, typer.Option(help="Stop after so many; 0 = no limit.")] = 0,
           budget_tokens: Annotated[int, typer.Option(help="Stop after so many, read and written; 0 = no limit.")] = 0):
    """Keep the queries that need long writing, with the word range each needs; the same command goes on where it stopped."""
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
