"""Two pages, each one file with everything inline: `index.html` shows the exhibits published beside measured, the claims ledger
and every run, from committed rows; `report.html` shows what the stages of one run folder left."""

import json
from pathlib import Path

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from lwzlib.base.rows import RunError, read_json, read_rows, write_atomic
from lwzlib.base.run_folder import provenance_of, stage_folders, status_of
from lwzlib.exhibits import catalogue, claims, figures
from lwzlib.exhibits.length_figure import asked_panel
from lwzlib.exhibits.results import Tables, scale_table
from lwzlib.exhibits.run_tables import (
    REWARDS,
    departures_of,
    held_out_changes,
    held_out_table,
    made_by,
    mixture_table,
    padding_share,
    quarter_means,
    run_table,
    stage_quantities,
)
from lwzlib.method.overlap import find_overlap
from lwzlib.method.text import parse

TEXT_BYTES = 2_500_000  # of completions in all, so that the page stays under 5 MB
_STEPS, _OF_STEP, _QUERIES = 3, 4, 4  # completions shown: of the first, middle and last step; held-out queries
_COMPARED = (*REWARDS, "answer_words_not_truncated", "think_tokens", "truncated")


def _write(path: Path, **content) -> Path:
    """Render the template that is named after the page; it escapes what it is given."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    write_atomic(path, environment.get_template(f"{path.name}.j2").render(rewards=REWARDS, **content))
    return path


def write_page(tables: Tables, folder: Path, runs: Path = Path("runs")) -> Path:
    """Write `index.html` into `folder`. Run folders of this machine, those below `runs`, add their completions."""
    folder.mkdir(parents=True, exist_ok=True)
    shown_runs = run_list(tables, runs)
    budget = TEXT_BYTES // max(1, sum(bool(run["folder"]) for run in shown_runs))
    for run in shown_runs:
        run["completions"], run["left_out"] = completions(run["folder"], budget) if run["folder"] else ([], 0)
    entries = claims.ledger(claims.load_claims(), tables)
    data = [{name: run[name] for name in ("name", "about", "curves", "means", "asked")} for run in shown_runs]
    return _write(
        folder / "index.html", runs=shown_runs, labels=figures.LABELS, compared=_COMPARED, spans=spans,
        settings=[(setting, _exhibits(tables.of(setting), setting)) for setting in catalogue.settings(tables)],
        verdicts=claims.by_verdict(entries), scales=scale_table(tables),
        entries=[(entry, claims.why_not_run(entry)) for entry in entries], rule=claims.__doc__.partition("\n\n")[2],
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def _exhibits(tables: Tables, setting: str) -> list[dict]:
    """Each exhibit of a setting: title, note, its picture or its rows, and its numbers as text."""
    shown = []
    for exhibit in catalogue.EXHIBITS.values():
        entry = {"name": exhibit.name, "title": exhibit.title, "note": exhibit.note, "is_table": exhibit.is_table}
        if exhibit.is_table:
            shown.append(entry | {"rows": exhibit.make(tables)})
        else:
            figure = catalogue.draw_exhibit(exhibit, tables)
            shown.append(entry | {"rows": catalogue.numbers(figure), "svg": catalogue.interactive(
                figure, f"{exhibit.name}-{setting}", exhibit.title)})
    return shown


def spans(row: tuple) -> list[tuple[str, int]]:
    """(cell, columns it spans): the last filled one takes the empty ones to its right."""
    cells = [str(cell) for cell in row]
    last = max(i for i, cell in enumerate(cells) if cell)
    return [(cell, 1) for cell in cells[:last]] + [(cells[last], len(cells) - last)]


def run_list(tables: Tables, runs: Path) -> list[dict]:
    """A row per arm and seed of each setting, and of each run folder that is not committed: name, where it comes from, curves
    and means for the comparison, and its folder on this machine (None if it is elsewhere), by fingerprint and commit: another
    commit may draw other samples."""
    here = {_mark(made_by(path.parent)): path.parent.parent for path in sorted(Path(runs).glob("*/*/*/provenance.json"))}
    listed = []
    for setting in tables.settings:
        listed += _runs_of(setting, tables.of(setting).rl, tables.of(setting).held_out)
    committed = set().union(*(run["marks"] for run in listed))
    for run in listed:
        run["folder"] = next((here[mark] for mark in sorted(run["marks"]) if mark in here), None)
    for folder in sorted(path for path in Path(runs).glob("*") if path.is_dir()):
        for run in _runs_of(f"runs/{folder.name}, not committed", run_table(folder), held_out_table(folder)):
            run["folder"] = folder / run["arm"]
            if not run["marks"] & committed and run["folder"] not in [other["folder"] for other in listed]:
                listed.append(run)
    for run in listed:
        stages = sorted(run["folder"].glob("*/recipe.yaml")) if run["folder"] else []
        run["asked"] = {name: " or ".join(map(str, values)) for name, values in stage_quantities(stages).items()}
    return listed


def _runs_of(setting: str, rl: pd.DataFrame, held_out: pd.DataFrame) -> list[dict]:
    arms = sorted({*zip(rl.arm, rl.seed, strict=True), *zip(held_out.arm, held_out.seed, strict=True)})
    return [_run(setting, arm, seed, rl, held_out) for arm, seed in arms]


def _mark(origin: dict) -> tuple[str, str]:
    return origin["fingerprint"], str(origin["commit"]).rstrip("+")


def _run(setting: str, arm: str, seed: int, rl: pd.DataFrame, held_out: pd.DataFrame) -> dict:
    rl, held_out = (table[(table.arm == arm) & (table.seed == seed)] for table in (rl, held_out))
    rl, known = rl.sort_values("step"), [table for table in (rl, held_out) if "commit" in table and len(table)]
    origin = {name: str(known[0][name].iloc[0]) if known else "not recorded"
              for name in ("model", "fingerprint", "commit", "hardware", "versions")}
    curves = {}
    for name in (name for name in _COMPARED if name in rl and rl[name].notna().any()):
        curves[name] = [None if pd.isna(value) else round(float(value), 4) for value in rl[name]]
    means = {f"{row['quantity']}, {part}": row[part] for row in quarter_means(rl).to_dict("records")
             for part in ("first quarter", "last quarter")}
    for phase, samples in held_out[held_out.phase != "during"].groupby("phase", sort=False):
        for name in (name for name in REWARDS if name in samples and samples[name].notna().any()):
            means[f"{name}, held out {phase}"] = float(samples[name].mean())
    return {"name": f"{setting}: {arm}, seed {seed}", "setting": setting, "arm": arm, "seed": int(seed), "steps": len(rl),
            "about": origin, "curves": curves, "means": {name: round(float(value), 4) for name, value in means.items()},
            "marks": {_mark(row) for table in known for row in table[["fingerprint", "commit"]].to_dict("records")}}


def completions(arm: Path, budget: int) -> tuple[list[dict], int]:
    """Completions of an arm: of the first, middle and last RL step, and for the first held-out queries before and after; and
    how many of these were left out for want of room (`budget` in bytes)."""
    rows = read_rows(arm / "grpo" / "completions.jsonl")
    steps = sorted({row["step"] for row in rows})
    wanted = []
    for step in sorted({steps[i * (len(steps) - 1) // (_STEPS - 1)] for i in range(_STEPS)}) if steps else []:
        of_step = [row for row in rows if row["step"] == step]
        wanted += [(f"RL step {step}", row) for row in of_step[:_OF_STEP]]
    for phase in ("before", "after"):
        for row in read_rows(arm / f"samples-{phase}" / "samples.jsonl")[:_QUERIES]:
            wanted.append((f"held out, {phase}: {row['query']}", row))
    kept, spent = [], 0
    for title, row in wanted:
        spent += len(row["completion"].encode("utf-8", "replace"))
        if spent <= budget:
            kept.append({"title": title} | cut({name: value for name, value in row.items() if value is not None}))
    return kept, len(wanted) - len(kept)


def cut(row: dict, near_duplicate: float = 0.6) -> dict:
    """A row with a completion, cut for the pages: plan, and the answer in parts (text, whether it repeats an earlier passage or
    the plan by its wording; what repeats by its meaning is not marked)."""
    parsed, parts, end = parse(row["completion"], "think"), [], 0
    overlap = find_overlap(parsed.answer, near_duplicate, parsed.plan)
    for i, passage in enumerate(overlap.passages):
        start = parsed.answer.index(passage, end)
        parts += [(parsed.answer[end:start], False), (passage, i in overlap.lexical)]
        end = start + len(passage)
    parts += [(parsed.answer[end:], False)]
    return row | {"plan": parsed.plan, "parts": [part for part in parts if part[0]]}


def write_report(folder: str | Path) -> Path:
    """Write `report.html` from what the stages of a run folder left; a part that was not run says so. Returns its path."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"no run folder {folder}; `lwz run nano` makes runs/nano")
    table, held_out = run_table(folder), held_out_table(folder)
    kept = [path for path in sorted([*folder.glob("*/recipe.yaml"), *folder.glob("*/*/recipe.yaml")])
            if path.parent.parent.name != "judges"]  # measured beside the run's own
    quantities = stage_quantities(kept)
    return _write(
        folder / "report.html", title=folder.name,
        quarters=quarter_means(table).to_dict("records") if len(table) else [],
        curves=figures.svg(figures.panel(table)) if len(table) else "", samples=_samples(held_out), judge=_judge(folder),
        pretrained=_pretrained(folder), heldout=_means(held_out), changes=held_out_changes(held_out).to_dict("records"),
        heldout_figure=figures.svg(figures.held_out_panel(held_out)) if len(held_out) else "",
        asked_figure=figures.svg(asked_panel(held_out)) if len(held_out) else "",
        asked=quantities, departures=departures_of(quantities), stages=_stages(folder))


def _judge(folder: Path) -> dict:
    """Quality of the run's Writing RM on held-out pairs, with its figure; empty if it has none."""
    path = folder / "writing-rm" / "quality.json"
    if not path.exists():
        return {}
    quality = read_json(path)
    figure = Figure(figsize=(6.8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figures.accuracy(quality, left)
    figures.calibration(quality, right)
    return quality | {"figure": figures.svg(figure)}


def _pretrained(folder: Path) -> list[dict]:
    """Mixture that was packed, and perplexity before and after pretraining; an arm that changes either has its own."""
    packs = [(pack, mixture_table(pack)) for pack in (folder / "pack", *sorted(folder.glob("*/pack")))]
    shown = []
    for pack, mixture in (pair for pair in packs if len(pair[1])):
        figure = Figure(figsize=(6.8, 0.8 + 0.36 * len(mixture)), layout="constrained")
        figures.mixture(mixture, figure.subplots())
        rows = pd.DataFrame(read_rows(pack.parent / "pretrain" / "perplexity.jsonl"), columns=["source", "when", "perplexity"])
        perplexity = rows.pivot(index="source", columns="when", values="perplexity").reindex(columns=["before", "after"])
        sources = mixture.merge(perplexity, "left", left_on="source", right_index=True).to_dict("records")
        shown.append({"of": "" if pack.parent == folder else pack.parent.name, "figure": figures.svg(figure),
                      "padding": padding_share(pack), "sources": sources})
    return shown


def _means(held_out: pd.DataFrame) -> list[dict]:
    """Mean rewards and lengths on held-out queries, before and after, of each arm."""
    names = [name for name in (*REWARDS, "answer_words", "think_words") if name in held_out]
    return [{"arm": arm, "phase": phase, "queries": len(rows)} | rows[names].mean().dropna().to_dict()
            for (arm, phase), rows in held_out.groupby(["arm", "phase"], sort=False)]


def _samples(held_out: pd.DataFrame, queries: int = 6) -> list[dict]:
    """Texts of each arm before and after, for each of the first held-out queries."""
    shown: dict[str, dict] = {}
    for _, rows in held_out.groupby(["arm", "phase"], sort=False):
        for row in (row.dropna().to_dict() for _, row in rows.head(queries).iterrows()):
            entry = shown.setdefault(row["id"], {"query": row["query"], "word_range": row["word_range"], "texts": []})
            entry["texts"].append(cut(row))
    return list(shown.values())


def _stages(folder: Path) -> list[dict]:
    """Each stage in the order in which they were started, with its status and provenance."""
    stages = []
    for stage in stage_folders(folder):
        origin = provenance_of(stage)
        versions = [f"{name} {version}" for name, version in origin["versions"].items()]
        machine = ", ".join([origin["hardware"], f"Python {origin['python']}", *versions])
        stages.append({"stage": str(stage.relative_to(folder)), "machine": machine} | status_of(stage) | origin)
    return sorted(stages, key=lambda row: (row["started"], row["stage"]))
