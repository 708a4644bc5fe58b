"""`index.html`: the kit's page. Exhibits published beside measured, the claims ledger, every run with its completions, and two
runs side by side. One file, inline, from committed rows; run folders of this machine add their completions."""

import json
from pathlib import Path

import pandas as pd
import yaml

from lwzlib import claims, exhibits, figures, report
from lwzlib.recipe import flatten
from lwzlib.results import FIGURES, Tables
from lwzlib.runs import read_rows, write_atomic

TEXT_BYTES = 2_500_000  # of completions in all, so that the page stays under 5 MB
_STEPS, _OF_STEP, _QUERIES = 3, 4, 4  # completions shown: of the first, middle and last step; held-out queries
_COMPARED = (*figures.REWARDS, "answer_words_not_truncated", "think_tokens", "truncated")


def write(tables: Tables, folder: Path, runs: Path = Path("runs")) -> Path:
    """Write the page into `folder`. Run folders are those below `runs`, if there is such a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = run_list(tables, runs)
    budget = TEXT_BYTES // max(1, sum(bool(run["folder"]) for run in found))
    for run in found:
        run["completions"], run["left_out"] = completions(run["folder"], budget) if run["folder"] else ([], 0)
    entries = claims.ledger(claims.load(FIGURES / "claims.yaml"), tables)
    data = [{name: run[name] for name in ("name", "about", "curves", "means", "asked")} for run in found]
    page = report.template("page.html.j2").render(
        settings=[(setting, _shown(tables.of(setting), setting)) for setting in exhibits.settings(tables)],
        entries=[(entry, claims.reason(entry)) for entry in entries], rule=claims.__doc__.partition("\n\n")[2], runs=found,
        rewards=figures.REWARDS, labels=figures.LABELS, compared=_COMPARED, spans=spans,
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def _shown(tables: Tables, setting: str) -> list[dict]:
    """Each exhibit of a setting: title, note, its picture or its rows, and its numbers as text."""
    shown = []
    for exhibit in exhibits.EXHIBITS.values():
        one = {"name": exhibit.name, "title": exhibit.title, "note": exhibit.note, "is_table": exhibit.is_table}
        if exhibit.is_table:
            one["rows"] = exhibit.make(tables)
        else:
            figure = exhibits.draw(exhibit, tables)
            one["rows"] = exhibits.numbers(figure)
            one["svg"] = exhibits.interactive(figure, f"{exhibit.name}-{setting}", exhibit.title)
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
    here = {_mark(figures.made_by(path.parent)): path.parent.parent
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
        rl, held_out = figures.run_table(folder), figures.held_out_table(folder)
        for arm, seed in sorted({*zip(rl.arm, rl.seed, strict=True), *zip(held_out.arm, held_out.seed, strict=True)}):
            run = _run(f"runs/{folder.name}, not committed", arm, seed, rl, held_out) | {"folder": folder / arm}
            if not run["marks"] & committed and folder / arm not in [other["folder"] for other in found]:
                found.append(run)
    for run in found:
        run["asked"] = _asked(run["folder"]) if run["folder"] else {}
    return found


def _mark(made: dict) -> tuple[str, str]:
    return made["fingerprint"], str(made["commit"]).rstrip("+")


def _asked(arm: Path) -> dict[str, str]:
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
    means = {f"{row['quantity']}, {part}": row[part] for row in figures.quarters(rl).to_dict("records")
             for part in ("first quarter", "last quarter")}
    for phase, of in held_out.groupby("phase", sort=False):
        if phase != "during":
            means |= {f"{name}, held out {phase}": float(of[name].mean()) for name in figures.REWARDS
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
            kept.append({"title": title} | report.cut({name: value for name, value in row.items() if value is not None}))
    return kept, len(wanted) - len(kept)
