"""Commands of the evaluations, under `lwz`: generate, judge, aggregate, arena, elo, rate, unblind."""

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from lwzlib.evaluate import TIE_MARGIN

app = typer.Typer()
out = Console()
Bench = Annotated[str, typer.Argument(help="writingbench or longbench.")]
Source = Annotated[str, typer.Option(help="The benchmark's file or hub:<dataset>, where the kit does not bring it along.")]
RunDir = Annotated[Path, typer.Argument(help="A run folder whose arms have held-out samples.")]
Anchor = Annotated[str, typer.Option(help="Who stands at 1000; default: the first by name.")]
BaseUrl = Annotated[str, typer.Option(help="A language model at this OpenAI-compatible address.")]
ModelName = Annotated[str, typer.Option(help="Its name there.")]
KeyEnv = Annotated[str, typer.Option(help="Name of the variable that holds the key.")]
Requirements = Annotated[str, typer.Option(help="WritingBench's folder of style, format and length subsets.")]
Asking = Annotated[list[str] | None, typer.Option(
    "--set", "-s", help="How it is asked: concurrency=64, budget_requests=1000, sampling.temperature=0, ...; repeatable")]


def _settings(base_url: str, model: str, api_key_env: str, sets: list[str] | None):
    from lwzlib.base.recipe import parse_overrides
    from lwzlib.endpoints import llm

    given = parse_overrides(sets)
    sampling = {name.removeprefix("sampling."): value for name, value in given.items() if name.startswith("sampling.")}
    others = {name: value for name, value in given.items() if not name.startswith("sampling.")}
    return llm.configure(base_url=base_url, model=model, api_key_env=api_key_env, sampling=sampling, **others)


@app.command()
def generate(bench: Annotated[str, typer.Argument(help="writingbench, longbench, arena, or queries (the kit's held-out).")],
             model: Annotated[str, typer.Argument(help="A folder, kit:<name>, a hub name, or its name at --base-url.")],
             to: Annotated[Path, typer.Option(help="The responses; what is known of each goes to <to>.rows.jsonl.")],
             source: Source = "", engine: Literal["transformers", "vllm", "server"] = "transformers",
             style: Annotated[Literal["think", "direct", "bare"], typer.Option(help="bare: the request alone.")] = "bare",
             frame: Annotated[Literal["chat", "plain"], typer.Option(help="plain: a base model.")] = "chat",
             batch: int = 8, seed: int = 0, base_url: BaseUrl = "", api_key_env: KeyEnv = "OPENAI_API_KEY",
             decoding: Annotated[list[str] | None, typer.Option(
                 help="Another decoding than the benchmark's: max_new_tokens=2000; repeatable")] = None,
             sets: Asking = None):
    """Write a model's completions of a benchmark's requests, with the benchmark's sampling; the same command goes on."""
    from lwzlib.base.recipe import parse_overrides
    from lwzlib.endpoints import engines
    from lwzlib.evaluate import benches

    made = {"transformers": lambda: engines.transformers(model, "bfloat16", "sdpa", batch),
            "vllm": lambda: engines.vllm(model, dtype="bfloat16"),
            "server": lambda: engines.server(_settings(base_url, model, api_key_env, sets), to.with_suffix(".replies.jsonl"))}
    rows = benches.generate(bench, source, made[engine](), style, frame, to, seed, parse_overrides(decoding))
    cut, refused = (sum(bool(row[what]) for row in rows) for what in ("truncated", "error"))
    out.print(f"{to}: {len(rows) - refused} responses, {cut} of them truncated; {refused} requests refused", highlight=False)


@app.command()
def judge(bench: Bench, responses: Path, to: Annotated[Path, typer.Option(help="The score file.")],
          base_url: BaseUrl, model: ModelName, source: Source = "",
          samples: Annotated[int, typer.Option(help="Judgments of the same.")] = 1, requirements: Requirements = "",
          api_key_env: KeyEnv = "OPENAI_API_KEY", sets: Asking = None):
    """Let a language model score responses, by the benchmark's own protocol, into its own score file; then aggregate. The
    same command goes on where it stopped, and asks nothing again that was answered."""
    from lwzlib.evaluate import common

    module, items = _protocol(bench, source)
    answers = common.read_responses(responses, items)
    settings = _settings(base_url, model, api_key_env, sets)
    _, missing = asyncio.run(module.judge_responses(settings, items, answers, to, samples))
    out.print(f"{to}: {len(answers)} responses judged; {len(missing)} judgments had no valid answer", highlight=False)
    aggregate(bench, to, source, responses, requirements)


@app.command()
def aggregate(bench: Bench, scores: Path, source: Source = "",
              responses: Annotated[Path | None, typer.Option(help="For LongBench-Write's length score.")] = None,
              requirements: Requirements = ""):
    """A score file's table, with 95% intervals over queries: the benchmark's scores and those of its parts."""
    from lwzlib.evaluate import common
    from lwzlib.evaluate.writingbench import read_requirements

    module, items = _protocol(bench, source)
    given = module.read_scores(scores, items)
    if bench == "writingbench":
        table = module.score_table(items, given, read_requirements(requirements, items) if requirements else None)
    else:
        table = module.score_table(items, common.read_responses(responses, items) if responses else {}, given)
    text = table.to_string(index=False, float_format="{:.2f}".format)
    out.print(f"{bench}: {scores}\n{text}", highlight=False, soft_wrap=True)


def _protocol(bench: str, source: str):
    """(module, items) of a benchmark whose responses are scored one by one."""
    from lwzlib.base.rows import DataError
    from lwzlib.evaluate import benches, longbench, writingbench

    modules = {"writingbench": writingbench, "longbench": longbench}
    if bench not in modules:
        raise DataError(f"responses of {bench!r} are not scored one by one; {' and '.join(modules)} are, `lwz arena` compares")
    return modules[bench], benches.read_bench(bench, source)[1]


@app.command()
def arena(source: Annotated[str, typer.Argument(help="A run folder with samples, or Arena-Write's file or hub:<...>.")],
          anchor: Anchor = "",
          player: Annotated[list[str] | None, typer.Option(help="name=FILE of `lwz generate`: one more; repeatable")] = None,
          to: Annotated[Path | None, typer.Option(help="The judgments; default: arena.jsonl, in the run folder.")] = None,
          writing_rm: Annotated[str, typer.Option(help="Judge by score: a Writing RM's folder. Default: the run's own.")] = "",
          margin: Annotated[float, typer.Option(help="Scores that differ by no more are a tie.")] = TIE_MARGIN,
          base_url: BaseUrl = "", model: ModelName = "", api_key_env: KeyEnv = "OPENAI_API_KEY", sets: Asking = None):
    """Judge every pair of models on the requests, in both orders; Elo with intervals."""
    from lwzlib.base.recipe import parse_overrides
    from lwzlib.evaluate import arena as arenas
    from lwzlib.evaluate.arena import read_arena, save_judgments

    run = Path(source) if Path(source).is_dir() else None
    made = arenas.of_samples(arenas.samples_of_run(run)) if run else read_arena(source)
    for name, file in parse_overrides(player).items():
        made = made.joined_by(name, arenas.read_player(file, made))
    to = to or (run or Path()) / "arena.jsonl"
    if base_url:
        settings = _settings(base_url, model, api_key_env, sets)
        judgments = asyncio.run(arenas.judged_by_llm(made, arenas.matches(made), settings, to.with_suffix(".replies.jsonl")))
    else:
        judgments = arenas.judged_by_writing_rm(made, writing_rm or (run or Path()) / "writing-rm" / "model", margin)
        out.print("The judge is a Writing RM. Of the arms that were trained on it, it shows what they learnt, not how "
                  "well they write.", soft_wrap=True)
    save_judgments(to, judgments)
    _ratings(judgments, anchor)


@app.command()
def elo(judgments: Annotated[list[Path], typer.Argument(help="JSONL files: of `lwz arena`, of `lwz unblind`, or your own.")],
        anchor: Anchor = ""):
    """Bradley-Terry Elo with intervals over queries, and win rates against the anchor, from recorded judgments."""
    import pandas as pd

    from lwzlib.evaluate import arena as arenas

    _ratings(pd.concat([arenas.read_judgments(path) for path in judgments], ignore_index=True), anchor)


@app.command()
def rate(run_dir: RunDir, to: Path = Path("rate.html"), pairs_per_query: int = 1, seed: int = 0,
         before: Annotated[bool, typer.Option(help="Also what the arms wrote before training.")] = False):
    """Write a page on which a person rates the arms' held-out texts blind, two side by side; its key stands beside it."""
    from lwzlib.evaluate import arena as arenas
    from lwzlib.evaluate import rating_sheet as sheets
    from lwzlib.evaluate.rating_sheet import make_sheet

    samples = {name: rows for name, rows in arenas.samples_of_run(run_dir).items() if before or not name.endswith(" before")}
    page = make_sheet(samples, to, pairs_per_query, seed)
    out.print(f"open {page}; keep {sheets.key_of(page)} for `lwz unblind`", highlight=False, soft_wrap=True)


@app.command()
def unblind(export: Path, key: Path,
            to: Annotated[Path | None, typer.Option(help="The judgments; default: the export's name, with .jsonl.")] = None):
    """Turn what a rater exported into the arena's judgments, for `lwz elo`."""
    from lwzlib.base.rows import DataError, read_rows, write_rows
    from lwzlib.evaluate import rating_sheet as sheets

    rows, to = sheets.unblind(export, key), to or export.with_suffix(".jsonl")
    if others := {row["judge"] for row in read_rows(to)} - {row["judge"] for row in rows}:
        raise DataError(f"{to} holds the judgments of {', '.join(sorted(others))}: give --to another file (`lwz elo` takes "
                        "several)")
    write_rows(to, rows)
    out.print(f"{to}: {len(rows)} judgments", highlight=False)


def _ratings(judgments, anchor: str) -> None:
    from lwzlib.evaluate import elo as ratings

    found = ratings.ratings(judgments, anchor or ratings.players(judgments)[0][0])
    table = Table("model", "Elo", "95% interval", "matches", "win rate against the anchor", title=f"{found.anchor} = 1000")
    against = ratings.win_tie_loss(judgments, found.anchor).set_index("other")
    for row in found.table.to_dict("records"):
        rate = 1 - against.win_rate[row["model"]] if row["model"] in against.index else None
        table.add_row(row["model"], f"{row['elo']:.0f}", f"{row['low']:.0f} to {row['high']:.0f}", f"{row['matches']:.0f}",
                      "" if rate is None else f"{rate:.0%}")
    out.print(table)
    for statement in found.statements:
        out.print(statement, highlight=False, soft_wrap=True)
