"""`lwz`: run, stage, status, corpus, recipe, estimate, prepare, doctor, score, hacks, serve-rm, curate, figures, export,
claims, report; generate, judge, aggregate, arena, elo, rate, unblind; jobs, submit."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from lwzlib.base.marks import published_marks
from lwzlib.base.recipe import Recipe, flatten, load_recipe, parse_overrides
from lwzlib.cli import evaluation, exhibits, jobs, rewards
from lwzlib.cli.options import Overrides, RunDir, Seed, out, resumable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="The LongWriter-Zero reproduction kit.")
app.add_typer(evaluation.app)
app.add_typer(exhibits.app)
app.add_typer(jobs.app)
app.add_typer(rewards.app)


@app.command()
def run(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """Execute the notebooks of a recipe in order, into its run folder; running it again continues."""
    from lwzlib.pipeline.notebooks import run_notebooks
    from lwzlib.pipeline.stages import run_folder

    loaded = load_recipe(recipe, sets)
    with resumable():
        run_notebooks(loaded, run_dir or run_folder(loaded, seed), seed, recipe, sets or [])


@app.command()
def stage(name: str, recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None,
          arm: Annotated[str, typer.Option(help="For the stages of an arm.")] = ""):
    """Do one stage here (or several: a,b), after those it needs: cold-start, writing-rm, corpus, distil, pack, pretrain; of an
    arm: samples-before, grpo or sft, samples-during, samples-after. Recipe `-` is read as JSON."""
    from lwzlib.base.processes import end_with_parent
    from lwzlib.pipeline import ranks
    from lwzlib.pipeline.stages import run_folder, run_stage

    if recipe == "-" and sets:
        raise typer.BadParameter("a recipe that is read as JSON is whole, and --set would not change it")
    end_with_parent()
    loaded = Recipe.model_validate_json(sys.stdin.read()) if recipe == "-" else load_recipe(recipe, sets)
    try:
        with resumable():
            for each in name.split(","):
                run_stage(each, loaded, run_dir or run_folder(loaded, seed), seed, arm)
    except typer.Exit as end:
        ranks.leave(end.exit_code)
        raise
    ranks.leave()


@app.command()
def status(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """The arms and stages of a run: what is done, running, to do, and how long each took. RECIPE may be a run folder, of which
    it shows what was started."""
    from lwzlib.pipeline.notebooks import overview, show_stages, stages_found
    from lwzlib.pipeline.stages import run_folder

    if Path(recipe).is_dir():
        return show_stages(Path(recipe), stages_found(recipe))
    loaded = load_recipe(recipe, sets)
    folder = run_dir or run_folder(loaded, seed)
    show_stages(folder, overview(loaded, folder, seed))


@app.command()
def corpus(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """Read, clean, filter and tokenise the recipe's corpus; the same command goes on where it stopped."""
    import json

    from lwzlib.pipeline.stages import run_folder, run_stage

    loaded = load_recipe(recipe, sets)
    with resumable():
        folder = run_stage("corpus", loaded, run_dir or run_folder(loaded, seed), seed)
    rows = json.loads((folder / "report.json").read_text())
    table = Table(*rows[0], title=f"{folder}: documents, and tokens kept")
    for row in rows:
        table.add_row(*map(str, row.values()))
    out.print(table)


@app.command(name="recipe")
def show_recipe(name: str, sets: Overrides = None):
    """Show a recipe beside the published setting, with the confidence of each published value."""
    loaded = load_recipe(name, sets)
    here, paper = (flatten(r.model_dump(exclude={"arms"})) for r in (loaded, load_recipe("paper")))
    marks = published_marks()
    table = Table(Column("quantity", no_wrap=True), *(Column(each, overflow="fold") for each in ("here", "paper")), "", "note",
                  title=f"recipe {name}")
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
    """Memory of a GPU, seconds and GPU-hours of GRPO, with the arithmetic. Exit code 1 for a recipe that cannot fit."""
    from lwzlib.cluster.plan_pages import planned, show_plan

    made = planned(recipe, sets, nodes, gpus, gpu, gpu_gib, mean_tokens)
    reasons = show_plan(made, out)
    for reason in reasons:
        print(f"lwz: recipe {recipe} cannot run on {made.gpus} x {made.gpu.name}: {reason}", file=sys.stderr)
    raise typer.Exit(int(bool(reasons)))


@app.command()
def prepare(tiny: Annotated[bool, typer.Option(help="Only the random model for tests.")] = False):
    """Make the embedded models and books once, in the cache: download, check, convert."""
    from lwzlib.base.kit import PARTS, TINY, is_prepared, prepare

    for name in (TINY,) if tiny else PARTS:
        known = is_prepared(name)
        folder = prepare(name, lambda line: out.print(f"  {line}", highlight=False))
        out.print(f"{name}: {'already in' if known else 'made in'} {folder}", highlight=False, soft_wrap=True)


@app.command()
def doctor():
    """Say what is missing, what that disables, and how to mend it. Exit code 1 if the nano recipe cannot run."""
    from lwzlib.cli import doctor as checks

    table = Table("", "part", "found", "without it", "how to mend")
    found = checks.examine()
    for check in found:
        table.add_row("ok" if check.found else "--", check.part, check.found or "no", check.disables,
                      "" if check.found else escape(check.mend))
    out.print(table)
    raise typer.Exit(int(any(check.needed and not check.found for check in found)))


@app.command()
def curate(source: Annotated[str, typer.Argument(help="kit:<name>, a .jsonl file with `query` a line, or hub:<dataset>.")],
           to: Annotated[Path, typer.Argument(help="A .jsonl file; rejects and replies are written beside it.")],
           base_url: Annotated[str, typer.Option(help="OpenAI-compatible, such as http://127.0.0.1:8000/v1.")],
           model: Annotated[str, typer.Option(help="The paper asks QwQ-32B.")],
           api_key_env: Annotated[str, typer.Option(help="Name of the variable that holds the key.")] = "OPENAI_API_KEY",
           sets: Annotated[list[str] | None, typer.Option("--set", "-s", help="Of endpoints.llm.Settings: concurrency=32, "
                                                          "requests_per_minute=60, sampling={temperature: 0.6}, ...")] = None,
           budget_requests: Annotated[int, typer.Option(help="Stop after so many; 0 = no limit.")] = 0,
           budget_tokens: Annotated[int, typer.Option(help="Stop after so many, read and written; 0 = no limit.")] = 0):
    """Keep the queries that need long writing, with the word range each needs; the same command goes on where it stopped."""
    import asyncio
    import collections

    from lwzlib.base.rows import rows_of
    from lwzlib.data import curate as curation
    from lwzlib.data import word_ranges
    from lwzlib.endpoints import llm

    given = {"base_url": base_url, "model": model, "api_key_env": api_key_env, "budget_requests": budget_requests,
             "budget_tokens": budget_tokens}
    settings = llm.configure(**given | parse_overrides(sets))
    with resumable():
        kept, rejects = asyncio.run(curation.curate(settings, source, to))
    out.print(f"{to}: {len(kept)} kept, {len(rejects)} rejected", highlight=False, soft_wrap=True)
    table = Table("rejected because", "queries")
    for reason, count in collections.Counter(row["reason"] for row in rejects).most_common():
        table.add_row(reason, str(count))
    if rejects:
        out.print(table)
    by_hand = {row["id"]: row["word_range"] for _, row in rows_of(source)
               if isinstance(row, dict) and row.get("id") and row.get("word_range")}
    if any(query.id in by_hand for query in kept):
        found = word_ranges.agreement({query.id: query.word_range for query in kept}, by_hand)
        out.print("against the ranges in the source:", ", ".join(f"{name} {value:.3g}" for name, value in found.items()),
                  highlight=False, soft_wrap=True)


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
