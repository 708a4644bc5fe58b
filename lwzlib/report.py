"""`report.html`: one self-contained page for a run folder; curves, samples, recipe and provenance."""

import json
from pathlib import Path

import jinja2
import yaml
from matplotlib.figure import Figure

from lwzlib import figures
from lwzlib import recipe as recipes
from lwzlib.runs import RunError, read_rows, write_atomic
from lwzlib.text import parse

REWARDS = ("length", "writing", "format")


def write(folder: str | Path) -> Path:
    """Write the page from what the stages left; a part that was not run says so. Returns its path."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"no run folder {folder}; `lwz run nano` makes runs/nano")
    table = figures.run_table(folder)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        title=folder.name, quarters=figures.quarters(table).to_dict("records") if len(table) else [],
        curves=figures.svg(figures.panel(table)) if len(table) else "", samples=_samples(folder),
        rewards=REWARDS, judge=_judge(folder), heldout=_heldout(folder),
        asked=_asked(folder), departures=_departures(folder), made=_provenance(folder))
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


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


def _phases(folder: Path):
    for arm in sorted(p.parent.name for p in folder.glob("*/grpo")):
        for phase in ("before", "after"):
            yield arm, phase, read_rows(folder / arm / f"samples-{phase}" / "samples.jsonl")


def _heldout(folder: Path) -> list[dict]:
    """Mean rewards on held-out queries, before and after RL."""
    return [{"arm": arm, "phase": phase, "queries": len(rows)} | {
        name: sum(row[name] for row in rows) / len(rows)
        for name in (*REWARDS, "answer_words", "think_words") if name in rows[0]}
        for arm, phase, rows in _phases(folder) if rows]


def _samples(folder: Path, queries: int = 6) -> list[dict]:
    """For each of the first held-out queries: what each arm wrote before and after."""
    shown: dict[str, dict] = {}
    for arm, phase, rows in _phases(folder):
        for row in rows[:queries]:
            cut = parse(row["completion"], "think")
            entry = shown.setdefault(row["id"], {"query": row["query"], "word_range": row["word_range"], "texts": []})
            entry["texts"].append(row | {"arm": arm, "phase": phase, "plan": cut.plan, "answer": cut.answer})
    return list(shown.values())


def _asked(folder: Path) -> list[tuple[str, object]]:
    files = sorted(folder.glob("*/grpo/recipe.yaml"))
    if not files:
        return []
    content = yaml.safe_load(files[0].read_text())
    content.pop("inputs")
    return list(recipes.flatten(content).items())


def _departures(folder: Path) -> list[tuple[str, object, object]]:
    paper = recipes.flatten(recipes.load("paper").model_dump())
    return [(name, paper[name], value) for name, value in _asked(folder) if name in paper and paper[name] != value]


def _provenance(folder: Path) -> list[dict]:
    found = []
    for path in sorted(folder.glob("**/provenance.json")):
        status = json.loads((path.parent / "status.json").read_text())
        found.append({"stage": str(path.parent.relative_to(folder))} | status | json.loads(path.read_text()))
    return found
