"""Commands of the evaluations, under `lwz`: generate, judge, aggregate, arena, elo, rate, unblind."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from lwzlib.base.recipe import parse_overrides
from lwzlib.base.rows import DataError, read_rows, write_atomic, write_rows
from lwzlib.cli.options import EVALUATE, KeyEnv, Requests, endpoint, out, say
from lwzlib.evaluate import TIE_MARGIN, rating_sheet

app = typer.Typer()
_BESIDE = (".replies.jsonl", ".missing.jsonl", ".rows.jsonl")  # what stands beside a file of scores or responses
Bench = Annotated[str, typer.Argument(help="writingbench or longbench.")]
Source = Annotated[str, typer.Option(help="The benchmark's file or hub:<dataset>, where the kit does not bring it along.")]
RunDir = Annotated[Path, typer.Argument(help="A run folder whose arms have held-out samples.")]
Anchor = Annotated[str, typer.Option(help="Who stands at 1000; default: the first by name.")]
BaseUrl = Annotated[str, typer.Option(help="A language model at this OpenAI-compatible address.")]
ModelName = Annotated[str, typer.Option(help="Its name there.")]
Requirements = Annotated[str, typer.Option(help="WritingBench's folder of style, format and length subsets.")]


@app.command(rich_help_panel=EVALUATE)
def generate(bench: Annotated[str, typer.Argument(help="writingbench, longbench, arena, or queries (the kit's held-out).")],
             model: Annotated[str, typer.Argument(help="A folder, kit:<name>, a hub name, or its name at --base-url.")],
             to: Annotated[Path, typer.Option(help="The responses; what is known of each goes to <to>.rows.jsonl.")],
             source: Source = "", engine: Literal["transformers", "vllm", "server"] = "transformers",
             style: Annotated[Literal["think", "direct", "bare"], typer.Option(help="bare: the request alone.")] = "bare",
             frame: Annotated[Literal["chat", "plain"], typer.Option(help="plain: a base model.")] = "chat",
             batch: int = 8, seed: int = 0, base_url: BaseUrl = "", api_key_env: KeyEnv = "OPENAI_API_KEY",
             decoding: Annotated[list[str] | None, typer.Option(
                 help="Another decoding than the benchmark's: max_new_tokens=2000; repeatable")] = None,
             sets: Requests = None):
    """Write a model's completions of a benchmark's requests.

    With the benchmark's sampling. The same command continues where it stopped."""
    from lwzlib.endpoints import engines
    from lwzlib.evaluate import benches

    if engine == "transformers":
        writer = engines.transformers(model, "bfloat16", "sdpa", batch)
    elif engine == "vllm":
        writer = engines.vllm(model, dtype="bfloat16")
    else:
        writer = engines.server(endpoint(base_url, model, api_key_env, sets), to.with_suffix(".replies.jsonl"))
    rows = benches.generate(bench, source, writer, style, frame, to, seed, parse_overrides(decoding))
    truncated, refused = sum(bool(row["truncated"]) for row in rows), sum(bool(row["error"]) for row in rows)
    say(f"{to}: {len(rows) - refused} responses, {truncated} of them truncated; {refused} requests refused")


@app.command(rich_help_panel=EVALUATE)
def judge(bench: Bench, responses: Path, to: Annotated[Path, typer.Option(help="The score file.")],
          base_url: BaseUrl, model: ModelName, source: Source = "",
          samples: Annotated[int, typer.Option(help="Judgments of the same.")] = 1, requirements: Requirements = "",
          api_key_env: KeyEnv = "OPENAI_API_KEY", sets: Requests = None):
    """Let a language model score responses; then aggregate.

    By the benchmark's own protocol, into its own score file. The same command continues where it stopped, and asks nothing
    again that was answered."""
    from lwzlib.evaluate import common

    module, items = _protocol(bench, source)
    answers = common.read_responses(responses, items)
    settings = endpoint(base_url, model, api_key_env, sets)
    _, missing = asyncio.run(module.judge_responses(settings, items, answers, to, samples))
    say(f"{to}: {len(answers)} responses judged; {len(missing)} judgments had no valid answer")
    aggregate(bench, to, source, responses, requirements)


@app.command(rich_help_panel=EVALUATE)
def aggregate(bench: Bench, scores: Path, source: Source = "",
              responses: Annotated[Path | None, typer.Option(help="For LongBench-Write's length score.")] = None,
              requirements: Requirements = "",
              to: Annotated[Path | None, typer.Option(help="Also write the table, unrounded: a .csv or .json file.")] = None):
    """Make a table of a score file, with 95% intervals.

    The benchmark's scores and those of its parts; the intervals are over queries. SCORES may be a folder of score files, one
    per model."""
    import pandas as pd

    from lwzlib.evaluate import common

    if to and to.suffix not in (".csv", ".json"):
        raise DataError(f"--to {to}: must end in .csv or .json")
    module, items = _protocol(bench, source)
    files = [scores]
    if scores.is_dir():
        files = [path for path in sorted(scores.glob("[!.]*.jsonl")) if not path.name.endswith(_BESIDE)]
    if not files:
        raise DataError(f"folder {scores} holds no score file (.jsonl)")
    if responses and scores.is_dir():
        raise DataError(f"--responses {responses} belongs to one score file, and {scores} is a folder: take them one by one")
    tables = []
    for file in files:
        notes: list[str] = []
        item_scores = module.read_scores(file, items, notes)
        if bench == "writingbench":
            further = module.read_requirements(requirements, items) if requirements else None
            table = module.score_table(items, item_scores, further)
        else:
            table = module.score_table(items, common.read_responses(responses, items) if responses else {}, item_scores)
        say(f"{bench}: {file}\n{table.to_string(index=False, float_format='{:.2f}'.format)}")
        say(*[f"note: {note}\n" for note in (*notes, *module.notes_on(items, item_scores))], sep="", end="")
        tables.append(table.assign(file=file.name))
    if to:
        whole = pd.concat(tables, ignore_index=True)
        records = whole.astype(object).where(whole.notna(), None).to_dict("records")
        as_json = json.dumps(records, indent=1, ensure_ascii=False)
        write_atomic(to, as_json if to.suffix == ".json" else whole.to_csv(index=False))
        say(f"{to}: {len(whole)} rows")


def _protocol(bench: str, source: str):
    """(module, items) of a benchmark whose responses are scored one by one."""
    from lwzlib.evaluate import benches, longbench, writingbench

    modules = {"writingbench": writingbench, "longbench": longbench}
    if bench not in modules:
        raise DataError(f"responses of {bench!r} are not scored one by one; {' and '.join(modules)} are, `lwz arena` compares")
    return modules[bench], benches.read_bench(bench, source)[1]


@app.command(rich_help_panel=EVALUATE)
def arena(source: Annotated[str, typer.Argument(help="A run folder with samples, or Arena-Write's file or hub:<...>.")],
          anchor: Anchor = "",
          player: Annotated[list[str] | None, typer.Option(help="name=FILE of `lwz generate`: one more; repeatable")] = None,
          to: Annotated[Path | None, typer.Option(help="The judgments; default: arena.jsonl, in the run folder.")] = None,
          writing_rm: Annotated[str, typer.Option(help="Judge by score: a Writing RM's folder. Default: the run's own.")] = "",
          margin: Annotated[float, typer.Option(help="Scores that differ by no more are a tie.")] = TIE_MARGIN,
          base_url: BaseUrl = "", model: ModelName = "", api_key_env: KeyEnv = "OPENAI_API_KEY", sets: Requests = None):
    """Judge every pair of models; Elo with intervals.

    Each pair is judged in both orders."""
    from lwzlib.evaluate import arena as arenas

    run = Path(source) if Path(source).is_dir() else None
    players = arenas.of_samples(arenas.samples_of_run(run)) if run else arenas.read_arena(source)
    for name, file in parse_overrides(player).items():
        players = players.joined_by(name, arenas.read_player(file, players))
    to = to or (run or Path()) / "arena.jsonl"
    if base_url:
        settings, replies = endpoint(base_url, model, api_key_env, sets), to.with_suffix(".replies.jsonl")
        judgments = asyncio.run(arenas.judged_by_llm(players, arenas.matches(players), settings, replies))
    else:
        judgments = arenas.judged_by_writing_rm(players, writing_rm or arenas.writing_rm_of(run or Path()), margin)
        say("The judge is a Writing RM. Of the arms that were trained on it, it shows what they learnt, not how well they "
            "write.")
    arenas.save_judgments(to, judgments)
    _show_ratings(judgments, anchor)


@app.command(rich_help_panel=EVALUATE)
def elo(judgments: Annotated[list[Path], typer.Argument(help="JSONL files: of `lwz arena`, of `lwz unblind`, or your own.")],
        anchor: Anchor = ""):
    """Compute Elo and win rates from recorded judgments.

    Bradley-Terry, with intervals over queries, and win rates against the anchor. Rows are {query_id, first, second, winner:
    first, second, tie or null, judge, reason}, where first and second are models in the order shown."""
    import pandas as pd

    from lwzlib.evaluate.arena import read_judgments

    _show_ratings(pd.concat([read_judgments(path) for path in judgments], ignore_index=True), anchor)


@app.command(rich_help_panel=EVALUATE)
def rate(run_dir: RunDir, to: Path = Path("rate.html"), pairs_per_query: int = 1, seed: int = 0,
         before: Annotated[bool, typer.Option(help="Also what the arms wrote before training.")] = False):
    """Make a page on which a person rates texts blind.

    Held-out texts of the arms, two side by side; the key stands beside the page."""
    from lwzlib.evaluate.arena import samples_of_run

    samples = {name: rows for name, rows in samples_of_run(run_dir).items() if before or not name.endswith(" before")}
    page = rating_sheet.make_sheet(samples, to, pairs_per_query, seed)
    say(f"open {page}; keep {rating_sheet.key_of(page)} for `lwz unblind`")


@app.command(rich_help_panel=EVALUATE)
def unblind(export: Path, key: Path,
            to: Annotated[Path | None, typer.Option(help="The judgments; default: the export's name, with .jsonl.")] = None):
    """Turn a rater's export into judgments, for `lwz elo`."""
    rows, to = rating_sheet.unblind(export, key), to or export.with_suffix(".jsonl")
    if others := {row["judge"] for row in read_rows(to)} - {row["judge"] for row in rows}:
        raise DataError(f"{to} holds the judgments of {', '.join(sorted(others))}: give --to another file (`lwz elo` takes "
                        "several)")
    write_rows(to, rows)
    say(f"{to}: {len(rows)} judgments")


def _show_ratings(judgments, anchor: str) -> None:
    from lwzlib.evaluate import elo as ratings

    rated = ratings.ratings(judgments, anchor or ratings.players(judgments)[0][0])
    table = Table("model", "Elo", "95% interval", "matches", "win rate against the anchor", title=f"{rated.anchor} = 1000")
    against = ratings.win_tie_loss(judgments, rated.anchor).set_index("other")
    for row in rated.table.to_dict("records"):
        known = row["model"] in against.index
        table.add_row(row["model"], f"{row['elo']:.0f}", f"{row['low']:.0f} to {row['high']:.0f}", f"{row['matches']:.0f}",
                      f"{1 - against.win_rate[row['model']]:.0%}" if known else "")
    out.print(table)
    for statement in rated.statements:
        say(statement)
