"""`lwz`: run, stage, status, corpus, recipe, estimate, prepare, doctor, score, hacks, serve-rm, curate, figures, export,
claims, report; generate, judge, aggregate, arena, elo, rate, unblind; jobs, submit."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lwzlib import figure_commands, job_commands, runs
from lwzlib import recipe as recipes
from lwzlib.evaluate import commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="The LongWriter-Zero reproduction kit.")
app.add_typer(commands.app)
app.add_typer(figure_commands.app)
app.add_typer(job_commands.app)
out = Console()
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", help="name=value, such as grpo.steps=5; repeatable")]
Seed = Annotated[int, typer.Option(help="Every random choice follows from it.")]
RunDir = Annotated[Path | None, typer.Option(help="Default: runs/<recipe>, or runs/<recipe>-seed<n>.")]


@contextlib.contextmanager
def _resumable():
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is lost: the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(runs.INTERRUPTED) from None


@app.command()
def run(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """Execute the notebooks of a recipe in order, into its run folder; running it again continues."""
    from lwzlib import launch, pipeline

    loaded = recipes.load(recipe, sets)
    with _resumable():
        pipeline.run(loaded, run_dir or launch.run_folder(loaded, seed), seed, recipe, sets or [])


@app.command()
def stage(name: str, recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None,
          arm: Annotated[str, typer.Option(help="For the stages of an arm.")] = ""):
    """Do one stage here (or several: a,b), after those it needs: cold-start, writing-rm, corpus, distil, pack, pretrain; of an
    arm: samples-before, grpo or sft, samples-during, samples-after. Recipe `-` is read as JSON."""
    from lwzlib import distributed, launch

    if recipe == "-" and sets:
        raise typer.BadParameter("a recipe that is read as JSON is whole, and --set would not change it")
    launch.end_with_parent()
    loaded = recipes.Recipe.model_validate_json(sys.stdin.read()) if recipe == "-" else recipes.load(recipe, sets)
    try:
        with _resumable():
            for each in name.split(","):
                launch.run_stage(each, loaded, run_dir or launch.run_folder(loaded, seed), seed, arm)
    except typer.Exit as end:
        distributed.leave(end.exit_code)
        raise
    distributed.leave()


@app.command()
def status(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """The arms and stages of a run: what is done, running, to do, and how long each took. RECIPE may be a run folder, of which
    it shows what was started."""
    from lwzlib import launch, pipeline

    if Path(recipe).is_dir():
        return pipeline.show(Path(recipe), pipeline.found(recipe))
    loaded = recipes.load(recipe, sets)
    folder = run_dir or launch.run_folder(loaded, seed)
    pipeline.show(folder, pipeline.overview(loaded, folder, seed))


@app.command()
def corpus(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """Read, clean, filter and tokenise the recipe's corpus; the same command goes on where it stopped."""
    import json

    from lwzlib import launch

    loaded = recipes.load(recipe, sets)
    with _resumable():
        folder = launch.run_stage("corpus", loaded, run_dir or launch.run_folder(loaded, seed), seed)
    rows = json.loads((folder / "report.json").read_text())
    table = Table(*rows[0], title=f"{folder}: documents, and tokens kept")
    for row in rows:
        table.add_row(*map(str, row.values()))
    out.print(table)


@app.command(name="recipe")
def show_recipe(name: str, sets: Overrides = None):
    """Show a recipe beside the published setting, with the confidence of each published value."""
    loaded = recipes.load(name, sets)
    here, paper = (recipes.flatten(r.model_dump(exclude={"arms"})) for r in (loaded, recipes.load("paper")))
    marks = recipes.marks()
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
    from lwzlib import plans

    made = plans.planned(recipe, sets, nodes, gpus, gpu, gpu_gib, mean_tokens)
    reasons = plans.show(made, out)
    for reason in reasons:
        print(f"lwz: recipe {recipe} cannot run on {made.gpus} x {made.gpu.name}: {reason}", file=sys.stderr)
    raise typer.Exit(int(bool(reasons)))


@app.command()
def prepare(tiny: Annotated[bool, typer.Option(help="Only the random model for tests.")] = False):
    """Make the embedded models and books once, in the cache: download, check, convert."""
    from lwzlib import models

    for name in (models.TINY,) if tiny else models.PARTS:
        known = models.is_prepared(name)
        folder = models.prepare(name, lambda line: out.print(f"  {line}", highlight=False))
        out.print(f"{name}: {'already in' if known else 'made in'} {folder}", highlight=False, soft_wrap=True)


@app.command()
def doctor():
    """Say what is missing, what that disables, and how to mend it. Exit code 1 if the nano recipe cannot run."""
    from lwzlib import doctor as checks

    table = Table("", "part", "found", "without it", "how to mend")
    found = checks.examine()
    for check in found:
        table.add_row("ok" if check.found else "--", check.part, check.found or "no", check.disables,
                      "" if check.found else escape(check.mend))
    out.print(table)
    raise typer.Exit(int(any(check.needed and not check.found for check in found)))


RmFolder = Annotated[str, typer.Option(help="Folder of a trained Writing RM, such as runs/nano/writing-rm/model.")]


def _judged(recipe: str, writing_rm: str, *overrides) -> recipes.Recipe:
    """The recipe with this Writing RM; without one, and if the recipe would train its own, without the writing reward."""
    named = writing_rm or recipes.load(recipe, *overrides).reward.writing.model
    judged = {"reward.weights.writing": 0.0} if named == "stage" else {"reward.writing.model": named}
    return recipes.load(recipe, *overrides, judged)


@app.command()
def score(text: Path, lower: int, upper: int, sets: Overrides = None, recipe: str = "nano",
          style: Literal["think", "direct"] = "think", query: str = "", writing_rm: RmFolder = ""):
    """Rewards of a completion in a file, and the passages that repeat; the writing reward if a Writing RM is named."""
    from lwzlib import rewards
    from lwzlib.text import count_words, parse

    loaded = _judged(recipe, writing_rm, sets)
    completion = text.read_text(encoding="utf-8", errors="replace")
    parsed, built = parse(completion, style), rewards.build(loaded)
    for name, reward in built.items():
        value = reward([completion], style=[style], word_range=[(lower, upper)], query=[query])[0]
        out.print(f"{name:7} {value:.3f}")
    out.print(f"answer  {count_words(parsed.answer)} words, plan {count_words(parsed.plan)} words, "
              f"form {'exact' if parsed.exact else 'broken'}")
    if "format" not in built:
        return
    found = built["format"].overlaps([parsed.answer], [parsed.plan])[0]
    for signal, passages in (("repeats", found.lexical), ("restates", found.semantic)):
        for later in list(passages)[:10]:
            out.print(f"{signal} {found.passages[later][:90]!r}", highlight=False)


@app.command()
def hacks(recipe: str = "nano", sets: Overrides = None, writing_rm: RmFolder = "",
          times: Annotated[float, typer.Option(help="Ask for so many times the words that the honest texts have.")] = 1):
    """Attacks on the rewards: honest against hacked, and the advantage that each would get inside an honest group."""
    from lwzlib import hacks as suite
    from lwzlib import rewards

    loaded = _judged(recipe, writing_rm, {"reward.length.max_words": round(400 * max(1, times))}, sets)  # the texts: up to 200
    built = rewards.build(loaded)
    found = suite.table(built, [getattr(loaded.reward.weights, name) for name in built], loaded.grpo.advantage,
                        among=suite.asking(times, loaded.data.languages))
    names = [*built, "advantage"]
    table = Table("attack", "words", *names, "gain", "wins", title=f"recipe {recipe}: honest>hacked", box=None)
    for row in found.to_dict("records"):
        pairs = [f"{row[f'honest_{name}']:.2f}>{row[f'hacked_{name}']:.2f}" for name in names]
        table.add_row(row["attack"], f"{row['words']:.0f}", *pairs, f"{row['difference']:+.2f}", f"{row['wins']:.0%}",
                      style="bold" if row["wins"] else "")
    out.print(table, "Bold: the hacked completion gets more than the honest one it was made from, in some group.")


@app.command()
def serve_rm(model: Annotated[Path, typer.Argument(help="Folder of a trained Writing RM.")],
             host: Annotated[str, typer.Option(help="Loopback unless you say otherwise; then set LWZ_RM_TOKEN.")] = "127.0.0.1",
             port: int = 8017, batch_texts: int = 32, queue_texts: int = 1024, dtype: str = "bfloat16",
             attention: str = "sdpa"):
    """Serve a Writing RM over HTTP: GET /health, POST /score."""
    from lwzlib import rm_server
    from lwzlib.reward_model import Scorer

    scorer = Scorer(model, dtype, attention)
    about = scorer.info
    rm_server.serve(rm_server.app(scorer, about["max_tokens"], scorer.count_tokens, batch_texts, queue_texts,
                                  about["identity"]), host, port)


@app.command()
def curate(source: Annotated[str, typer.Argument(help="kit:<name>, a .jsonl file with `query` a line, or hub:<dataset>.")],
           to: Annotated[Path, typer.Argument(help="A .jsonl file; rejects and replies are written beside it.")],
           base_url: Annotated[str, typer.Option(help="OpenAI-compatible, such as http://127.0.0.1:8000/v1.")],
           model: Annotated[str, typer.Option(help="The paper asks QwQ-32B.")],
           api_key_env: Annotated[str, typer.Option(help="Name of the variable that holds the key.")] = "OPENAI_API_KEY",
           sets: Annotated[list[str] | None, typer.Option("--set", "-s", help="Of lwzlib.llm.Settings: concurrency=32, "
                                                          "requests_per_minute=60, sampling={temperature: 0.6}, ...")] = None,
           budget_requests: Annotated[int, typer.Option(help="Stop after so many; 0 = no limit.")] = 0,
           budget_tokens: Annotated[int, typer.Option(help="Stop after so many, read and written; 0 = no limit.")] = 0):
    """Keep the queries that need long writing, with the word range each needs; the same command goes on where it stopped."""
    import asyncio
    import collections

    from lwzlib import curate as curation
    from lwzlib import data, llm, ranges

    given = {"base_url": base_url, "model": model, "api_key_env": api_key_env, "budget_requests": budget_requests,
             "budget_tokens": budget_tokens}
    settings = llm.configure(**given | recipes.assigned(sets))
    with _resumable():
        kept, rejects = asyncio.run(curation.curate(settings, source, to))
    out.print(f"{to}: {len(kept)} kept, {len(rejects)} rejected", highlight=False, soft_wrap=True)
    table = Table("rejected because", "queries")
    for reason, count in collections.Counter(row["reason"] for row in rejects).most_common():
        table.add_row(reason, str(count))
    if rejects:
        out.print(table)
    by_hand = {row["id"]: row["word_range"] for _, row in data.rows_of(source)
               if isinstance(row, dict) and row.get("id") and row.get("word_range")}
    if any(query.id in by_hand for query in kept):
        found = ranges.agreement({query.id: query.word_range for query in kept}, by_hand)
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
