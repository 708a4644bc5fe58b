"""`report.html`: one self-contained page for one run folder; curves, mixture, samples, recipe, stages and provenance. All
runs beside the paper are in `page`."""

import json
from pathlib import Path

import jinja2
import pandas as pd
import yaml
from matplotlib.figure import Figure

from lwzlib import figures
from lwzlib import recipe as recipes
from lwzlib.overlap import find_overlap
from lwzlib.runs import RunError, read_rows, status_of, write_atomic
from lwzlib.text import parse


def write(folder: str | Path) -> Path:
    """Write the page from what the stages left; a part that was not run says so. Returns its path."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"no run folder {folder}; `lwz run nano` makes runs/nano")
    table, held_out, asked = figures.run_table(folder), figures.held_out_table(folder), _asked(folder)
    page = template("report.html.j2").render(
        title=folder.name, quarters=figures.quarters(table).to_dict("records") if len(table) else [],
        curves=figures.svg(figures.panel(table)) if len(table) else "", samples=_samples(held_out),
        rewards=figures.REWARDS, judge=_judge(folder), pretrained=_pretrained(folder), heldout=_means(held_out),
        changes=figures.changes(held_out).to_dict("records"),
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
        mixture = figures.mixture_table(pack)
        if mixture.empty:
            continue
        figure = Figure(figsize=(6.8, 0.8 + 0.36 * len(mixture)), layout="constrained")
        figures.mixture(mixture, figure.subplots())
        rows = pd.DataFrame(read_rows(pack.parent / "pretrain" / "perplexity.jsonl"), columns=["source", "when", "perplexity"])
        perplexity = rows.pivot(index="source", columns="when", values="perplexity").reindex(columns=["before", "after"])
        found.append({"of": "" if pack.parent == folder else pack.parent.name, "figure": figures.svg(figure),
                      "padding": figures.padding(pack), "sources": mixture.merge(
                          perplexity, "left", left_on="source", right_index=True).to_dict("records")})
    return found


def _means(held_out: pd.DataFrame) -> list[dict]:
    """Mean rewards and lengths on held-out queries, before and after, of each arm."""
    wanted = [name for name in (*figures.REWARDS, "answer_words", "think_words") if name in held_out]
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


def _asked(folder: Path) -> dict[str, list]:
    """{quantity: its values}, from what each stage was asked: more than one where an arm has its own."""
    found: dict[str, list] = {}
    for path in sorted([*folder.glob("*/recipe.yaml"), *folder.glob("*/*/recipe.yaml")]):
        content = yaml.safe_load(path.read_text())
        content.pop("inputs")
        for name, value in recipes.flatten(content).items():
            values = found.setdefault(name, [])
            values += [value] if value not in values else []
    return found


def _departures(asked: dict[str, list]) -> list[tuple[str, object, list]]:
    paper = recipes.flatten(recipes.load("paper").model_dump(mode="json"))
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
