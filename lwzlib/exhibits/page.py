"""`index.html`: the kit's page. Exhibits published beside measured, the claims ledger, every run with its completions, and two
runs side by side. One file, inline, from committed rows; run folders of this machine add their completions."""

import json
from pathlib import Path

import jinja2
import pandas as pd
import yaml
from matplotlib.figure import Figure

from lwzlib.base.recipe import flatten, load_recipe
from lwzlib.base.rows import RunError, read_rows, write_atomic
from lwzlib.base.run_folder import status_of
from lwzlib.exhibits import catalogue, claims, figures
from lwzlib.exhibits.catalogue import draw_exhibit
from lwzlib.exhibits.claims import load_claims, why_not_run
from lwzlib.exhibits.results import FIGURES, Tables
from lwzlib.exhibits.run_tables import REWARDS, changes, held_out_table, made_by, mixture_table, padding, quarters, run_table
from lwzlib.method.overlap import find_overlap
from lwzlib.method.text import parse

TEXT_BYTES = 2_500_000  # of completions in all, so that the page stays under 5 MB
_STEPS, _OF_STEP, _QUERIES = 3, 4, 4  # completions shown: of the first, middle and last step; held-out queries
_COMPARED = (*REWARDS, "answer_words_not_truncated", "think_tokens", "truncated")


def write_page(tables: Tables, folder: Path, runs: Path = Path("runs")) -> Path:
    """Write the page into `folder`. Run folders are those below `runs`, if there is such a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = run_list(tables, runs)
    budget = TEXT_BYTES // max(1, sum(bool(run["folder"]) for run in found))
    for run in found:
        run["completions"], run["left_out"] = completions(run["folder"], budget) if run["folder"] else ([], 0)
    entries = claims.ledger(load_claims(FIGURES / "claims.yaml"), tables)
    data = [{name: run[name] for name in ("name", "about", "curves", "means", "asked")} for run in found]
    page = template("page.html.j2").render(
        settings=[(setting, _shown(tables.of(setting), setting)) for setting in catalogue.settings(tables)],
        entries=[(entry, why_not_run(entry)) for entry in entries], rule=claims.__doc__.partition("\n\n")[2], runs=found,
        rewards=REWARDS, labels=figures.LABELS, compared=_COMPARED, spans=spans,
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def _shown(tables: Tables, setting: str) -> list[dict]:
    """Each exhibit of a setting: title, note, its picture or its rows, and its numbers as text."""
    shown = []
    for exhibit in catalogue.EXHIBITS.values():
        one = {"name": exhibit.name, "title": exhibit.title, "note": exhibit.note, "is_table": exhibit.is_table}
        if exhibit.is_table:
            one["rows"] = exhibit.make(tables)
        else:
            figure = draw_exhibit(exhibit, tables)
            one["rows"] = catalogue.numbers(figure)
            one["svg"] = catalogue.interactive(figure, f"{exhibit.name}-{setting}", exhibit.title)
        shown.append(one)
    return shown


def spans(row: tuple) -> list[tuple[str, int]]:
    """(cell, columns it spans): the last filled one takes the empty ones to its right."""
    cells = [str(cell) for cell in row]
    last = max(i for i, cell in enumerate(cells) if cell)
    return [(cell, 1) for cell in cells[:last]] + [(cells[last], len(cells) - last)]


def run_list(tables: Tables, runs: Path) -> list[dict]:
    """A row an arm and seed of each setting, and of each run folder that is not committed: name, where it comes from,
    curves and means for the comparison, and its folder on this machine (None if it is elsewhere), by fingerprint and commit:
    another commit may draw other samples."""
    here = {_mark(made_by(path.parent)): path.parent.parent
            for path in sorted(Path(runs).glob("*/*/*/provenance.json"))}
    found, committed = [], set()
    groups = [(setting, tables.of(setting).rl, tables.of(setting).held_out) for setting in tables.settings]
    for setting, rl, held_out in groups:
        for arm, seed in sorted({*zip(rl.arm, rl.seed, strict=True), *zip(held_out.arm, held_out.seed, strict=True)}):
            run = _run(setting, arm, seed, rl, held_out)
            committed |= run["marks"]
            run["folder"] = next((here[mark] for mark in sorted(run["marks"]) if mark in here), None)
            found.append(run)
    for folder in sorted(path for path in Path(runs).glob("*") if path.is_dir()):
        rl, held_out = run_table(folder), held_out_table(folder)
        for arm, seed in sorted({*zip(rl.arm, rl.seed, strict=True), *zip(held_out.arm, held_out.seed, strict=True)}):
            run = _run(f"runs/{folder.name}, not committed", arm, seed, rl, held_out) | {"folder": folder / arm}
            if not run["marks"] & committed and folder / arm not in [other["folder"] for other in found]:
                found.append(run)
    for run in found:
        run["asked"] = _quantities_of_arm(run["folder"]) if run["folder"] else {}
    return found


def _mark(made: dict) -> tuple[str, str]:
    return made["fingerprint"], str(made["commit"]).rstrip("+")


def _quantities_of_arm(arm: Path) -> dict[str, str]:
    """Every quantity that the stages of an arm depended on, by its dotted name."""
    stages = sorted(arm.glob("*/recipe.yaml"))
    return {name: str(value) for stage in stages for name, value in flatten(yaml.safe_load(stage.read_text())).items()
            if not name.startswith("inputs.")}


def _run(setting: str, arm: str, seed: int, rl: pd.DataFrame, held_out: pd.DataFrame) -> dict:
    rl, held_out = (table[(table.arm == arm) & (table.seed == seed)] for table in (rl, held_out))
    rl, known = rl.sort_values("step"), [table for table in (rl, held_out) if "commit" in table and len(table)]
    about = {name: str(known[0][name].iloc[0]) if known else "not recorded"
             for name in ("model", "fingerprint", "commit", "hardware", "versions")}
    curves = {name: [None if pd.isna(value) else round(float(value), 4) for value in rl[name]]
              for name in _COMPARED if name in rl and rl[name].notna().any()}
    means = {f"{row['quantity']}, {part}": row[part] for row in quarters(rl).to_dict("records")
             for part in ("first quarter", "last quarter")}
    for phase, of in held_out.groupby("phase", sort=False):
        if phase != "during":
            means |= {f"{name}, held out {phase}": float(of[name].mean()) for name in REWARDS
                      if name in of and of[name].notna().any()}
    return {"name": f"{setting}: {arm}, seed {seed}", "setting": setting, "arm": arm, "seed": int(seed), "steps": len(rl),
            "about": about, "curves": curves, "means": {name: round(float(value), 4) for name, value in means.items()},
            "marks": {_mark(row) for table in known for row in table[["fingerprint", "commit"]].to_dict("records")}}


def completions(arm: Path, budget: int) -> tuple[list[dict], int]:
    """What an arm wrote: of the first, middle and last RL step, and for the first held-out queries before and after; and how
    many of these were left out for want of room (`budget` in bytes)."""
    rows = read_rows(arm / "grpo" / "completions.jsonl")
    steps = sorted({row["step"] for row in rows})
    wanted = []
    for step in sorted({steps[i * (len(steps) - 1) // (_STEPS - 1)] for i in range(_STEPS)}) if steps else []:
        wanted += [(f"RL step {step}", row) for row in [row for row in rows if row["step"] == step][:_OF_STEP]]
    for phase in ("before", "after"):
        for row in read_rows(arm / f"samples-{phase}" / "samples.jsonl")[:_QUERIES]:
            wanted.append((f"held out, {phase}: {row['query']}", row))
    kept, spent = [], 0
    for title, row in wanted:
        spent += len(row["completion"].encode("utf-8", "replace"))
        if spent <= budget:
            kept.append({"title": title} | cut({name: value for name, value in row.items() if value is not None}))
    return kept, len(wanted) - len(kept)


def write_report(folder: str | Path) -> Path:
    """Write the page from what the stages left; a part that was not run says so. Returns its path."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"no run folder {folder}; `lwz run nano` makes runs/nano")
    table, held_out, asked = run_table(folder), held_out_table(folder), _quantities(folder)
    page = template("report.html.j2").render(
        title=folder.name, quarters=quarters(table).to_dict("records") if len(table) else [],
        curves=figures.svg(figures.panel(table)) if len(table) else "", samples=_samples(held_out),
        rewards=REWARDS, judge=_judge(folder), pretrained=_pretrained(folder), heldout=_means(held_out),
        changes=changes(held_out).to_dict("records"),
        heldout_figure=figures.svg(figures.held_out_panel(held_out)) if len(held_out) else "",
        asked=asked, departures=_departures(asked), stages=_stages(folder))
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def template(name: str) -> jinja2.Template:
    """A page's template, which escapes what it is given."""
    return jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(name)


def cut(row: dict, near_duplicate: float = 0.6) -> dict:
    """A row with a completion, cut for the pages: plan, and the answer in parts (text, whether it repeats an earlier
    passage or the plan by its wording; what repeats by its meaning is not marked)."""
    parsed, parts, end = parse(row["completion"], "think"), [], 0
    found = find_overlap(parsed.answer, near_duplicate, parsed.plan)
    for i, passage in enumerate(found.passages):
        start = parsed.answer.index(passage, end)
        parts += [(parsed.answer[end:start], False), (passage, i in found.lexical)]
        end = start + len(passage)
    parts += [(parsed.answer[end:], False)]
    return row | {"plan": parsed.plan, "parts": [part for part in parts if part[0]]}


def _judge(folder: Path) -> dict:
    """What held-out pairs say of the run's Writing RM; empty if it has none."""
    path = folder / "writing-rm" / "quality.json"
    if not path.exists():
        return {}
    quality = json.loads(path.read_text())
    figure = Figure(figsize=(6.8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figures.accuracy(quality, left)
    figures.calibration(quality, right)
    return quality | {"figure": figures.svg(figure)}


def _pretrained(folder: Path) -> list[dict]:
    """What was packed and what the pretraining did to the perplexity; an arm that changes either has its own."""
    found = []
    for pack in (folder / "pack", *sorted(folder.glob("*/pack"))):
        mixture = mixture_table(pack)
        if mixture.empty:
            continue
        figure = Figure(figsize=(6.8, 0.8 + 0.36 * len(mixture)), layout="constrained")
        figures.mixture(mixture, figure.subplots())
        rows = pd.DataFrame(read_rows(pack.parent / "pretrain" / "perplexity.jsonl"), columns=["source", "when", "perplexity"])
        perplexity = rows.pivot(index="source", columns="when", values="perplexity").reindex(columns=["before", "after"])
        found.append({"of": "" if pack.parent == folder else pack.parent.name, "figure": figures.svg(figure),
                      "padding": padding(pack), "sources": mixture.merge(
                          perplexity, "left", left_on="source", right_index=True).to_dict("records")})
    return found


def _means(held_out: pd.DataFrame) -> list[dict]:
    """Mean rewards and lengths on held-out queries, before and after, of each arm."""
    wanted = [name for name in (*REWARDS, "answer_words", "think_words") if name in held_out]
    groups = held_out.groupby(["arm", "phase"], sort=False)
    return [{"arm": arm, "phase": phase, "queries": len(rows)} | rows[wanted].mean().dropna().to_dict()
            for (arm, phase), rows in groups]


def _samples(held_out: pd.DataFrame, queries: int = 6) -> list[dict]:
    """For each of the first held-out queries: what each arm wrote before and after."""
    shown: dict[str, dict] = {}
    for _, rows in held_out.groupby(["arm", "phase"], sort=False):
        for row in (row.dropna().to_dict() for _, row in rows.head(queries).iterrows()):
            entry = shown.setdefault(row["id"], {"query": row["query"], "word_range": row["word_range"], "texts": []})
            entry["texts"].append(cut(row))
    return list(shown.values())


def _quantities(folder: Path) -> dict[str, list]:
    """{quantity: its values}, from what each stage was asked: more than one where an arm has its own."""
    found: dict[str, list] = {}
    for path in sorted([*folder.glob("*/recipe.yaml"), *folder.glob("*/*/recipe.yaml")]):
        content = yaml.safe_load(path.read_text())
        content.pop("inputs")
        for name, value in flatten(content).items():
            values = found.setdefault(name, [])
            values += [value] if value not in values else []
    return found


def _departures(asked: dict[str, list]) -> list[tuple[str, object, list]]:
    paper = flatten(load_recipe("paper").model_dump(mode="json"))
    return [(name, paper[name], values) for name, values in asked.items() if name in paper and values != [paper[name]]]


def _stages(folder: Path) -> list[dict]:
    """Each stage in the order in which they were started, with its status and provenance."""
    found = []
    for path in folder.glob("**/provenance.json"):
        status = status_of(path.parent)
        made = json.loads(path.read_text())
        machine = ", ".join([made["hardware"], f"Python {made['python']}", *(f"{k} {v}" for k, v in made["versions"].items())])
        found.append({"stage": str(path.parent.relative_to(folder)), "machine": machine} | status | made)
    return sorted(found, key=lambda row: (row["started"], row["stage"]))
