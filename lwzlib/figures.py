"""Figures as pure functions of tables: (table, ax) -> ax. No network, no GPU, the same bytes every time.

A table has a row a step: arm, seed, step and the columns of `metrics.jsonl`. What was not measured is a gap.
"""

import io
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lwzlib.runs import RunError, read_rows

matplotlib.rcParams.update({"svg.hashsalt": "lwzlib", "svg.fonttype": "none", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
# Okabe and Ito's palette, safe for the colour-blind; dashes keep the arms apart in grey.
STYLES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D"),
          ("#E69F00", (0, (5, 1)), "v"), ("#56B4E9", (0, (1, 1)), "P"), ("#000000", (0, (3, 1, 1, 1)), "X")]
LABELS = {"length": "length reward", "format": "format reward", "writing": "Writing RM score", "think_words": "plan, words",
          "answer_words": "answer, words", "completion_tokens": "completion, tokens", "truncated": "share truncated"}
_KEPT = ("length", "writing", "format", "think_words", "answer_words", "think_tokens", "answer_tokens", "completion_tokens",
         "answer_words_not_truncated", "truncated", "groups_without_variance", "entropy", "loss", "step_s")


def run_table(folder: str | Path) -> pd.DataFrame:
    """The GRPO rows of every arm in a run folder, each with its provenance. Empty if there are none."""
    import json

    import yaml

    tables = []
    for grpo in sorted(Path(folder).glob("*/grpo")):
        rows = pd.DataFrame(read_rows(grpo / "metrics.jsonl"))
        if rows.empty:
            continue
        made = json.loads((grpo / "provenance.json").read_text())
        asked = yaml.safe_load((grpo / "recipe.yaml").read_text())
        about = {"model": asked["model"]["name"], "arm": grpo.parent.name, "seed": asked["seed"],
                 "fingerprint": json.loads((grpo / "status.json").read_text())["fingerprint"],
                 "commit": made["commit"], "hardware": made["hardware"],
                 "versions": " ".join(f"{name} {v}" for name, v in made["versions"].items())}
        kept = rows[["step", *(c for c in _KEPT if c in rows)]]
        tables.append(kept.assign(**about)[[*about, *kept.columns]])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["arm", "seed", "step"])


def quarters(table: pd.DataFrame, columns=("length", "writing", "format")) -> pd.DataFrame:
    """Mean over the first and the last quarter of the steps, per arm and seed."""
    out = []
    for (arm, seed), rows in table.groupby(["arm", "seed"], sort=True):
        size = max(1, len(rows) // 4)
        ordered = rows.sort_values("step")
        for column in (c for c in columns if ordered.get(c) is not None and ordered[c].notna().any()):
            out.append({"arm": arm, "seed": seed, "quantity": column, "first quarter": ordered[column][:size].mean(),
                        "last quarter": ordered[column][-size:].mean(), "steps": len(rows)})
    return pd.DataFrame(out)


def curve(table: pd.DataFrame, ax: Axes, column: str, window: int = 5) -> Axes:
    """One quantity over RL steps: a point a step, and each arm's centred mean over `window` steps; over several seeds
    the mean and the range."""
    for i, (arm, rows) in enumerate(table.groupby("arm", sort=True)):
        colour, dash, marker = STYLES[i % len(STYLES)]
        per_seed = rows.pivot(index="step", columns="seed", values=column)
        smooth = per_seed.rolling(window, center=True, min_periods=1).mean()
        for seed in per_seed:
            ax.plot(per_seed.index, per_seed[seed], marker, color=colour, alpha=0.25, markersize=2.5)
        if smooth.shape[1] > 1:
            ax.fill_between(smooth.index, smooth.min(axis=1), smooth.max(axis=1), color=colour, alpha=0.12, linewidth=0)
        ax.plot(smooth.index, smooth.mean(axis=1), dash, color=colour, label=arm)
    ax.set_xlabel("RL step")
    ax.set_ylabel(LABELS.get(column, column))
    if column in ("length", "format", "truncated"):
        ax.set_ylim(-0.03, 1.03)
    return ax


def roc(table: pd.DataFrame, ax: Axes) -> Axes:
    """One curve for each kind of repetition against the honest passages (kind `plain`): columns kind, score."""
    from sklearn.metrics import roc_curve

    honest = table[table.kind == "plain"].score
    for i, kind in enumerate(("copied", "reworded", "templated", "paraphrased by hand")):
        found = table[table.kind == kind].score
        if len(found):
            colour, dash, _ = STYLES[i]
            blamed, hit, _ = roc_curve([0] * len(honest) + [1] * len(found), [*honest, *found])
            ax.plot(blamed, hit, dash, color=colour, label=f"{kind} ({len(found)})")
    ax.set(xlabel=f"share of {len(honest)} honest passages blamed", ylabel="share of repetitions found", xlim=(-0.01, 0.5))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)
    return ax


def accuracy(quality: dict, ax: Axes) -> Axes:
    """Accuracy of a Writing RM by kind of pair, with its interval; `quality` as `reward_model.quality` gives it."""
    kinds = sorted(quality["accuracy"].items(), key=lambda item: item[1][0])
    for i, (kind, (share, low, high, _)) in enumerate(kinds):
        colour = STYLES[0][0] if kind != "all" else "black"
        ax.errorbar(share, i, xerr=[[share - low], [high - share]], fmt="o", color=colour, capsize=2)
    ax.axvline(0.5, linestyle=":", color="grey")
    ax.set_yticks(range(len(kinds)), [f"{kind} ({n})" for kind, (*_, n) in kinds])
    ax.set(xlabel="held-out pairs told apart, 95% interval", xlim=(0, 1.03))
    return ax


def calibration(quality: dict, ax: Axes) -> Axes:
    """Observed against expected win rate of the higher-scored text, in fifths of the held-out pairs."""
    expected, observed, _ = zip(*quality["calibration"], strict=True)
    ax.plot([0.5, 1], [0.5, 1], ":", color="grey")
    ax.plot(expected, observed, "o-", color=STYLES[0][0])
    ax.set(xlabel="expected win rate", ylabel="observed win rate", xlim=(0.48, 1.02), ylim=(0.28, 1.02))
    return ax


def signals(table: pd.DataFrame, ax: Axes) -> Axes:
    """Each attack of the hack suite: Writing RM score, hacked less honest, against format reward of the hacked."""
    change = table.hacked_writing - table.honest_writing
    ax.scatter(table.hacked_format, change, color=STYLES[1][0], s=14)
    ax.axhline(0, linestyle=":", color="grey")
    for place, (attack, x, y) in enumerate(sorted(zip(table.attack, table.hacked_format, change, strict=True))):
        ax.annotate(attack.replace("_", " "), (x, y), fontsize=6.5, xytext=(3, 5 * (place % 3) - 5), textcoords="offset points")
    ax.set(xlabel="format reward of the cheat (honest: 1)", ylabel="Writing RM: cheat less honest", xlim=(-0.04, 1.25))
    return ax


def panel(table: pd.DataFrame, columns=("length", "format", "writing", "answer_words", "think_words", "truncated")) -> Figure:
    """Several curves in one figure, with one legend; says so where there is nothing to draw."""
    rows = (len(columns) + 1) // 2
    figure = Figure(figsize=(6.8, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 2).ravel()
    for ax, column in zip(axes, columns, strict=False):
        if column in table and table[column].notna().any():
            curve(table, ax, column)
        else:
            ax.text(0.5, 0.5, f"{LABELS.get(column, column)}: not run here", ha="center", transform=ax.transAxes)
    for ax in axes[len(columns):]:
        ax.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG text without a date, to stand inside a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg"):]


def draw_all(results: Path, folder: Path) -> list[Path]:
    """Redraw each `results/*.csv` into `folder` as SVG, PDF and PNG. Raises RunError if there is no such file."""
    sources = sorted(Path(results).glob("*.csv"))
    if not sources:
        raise RunError(f"no results in {results}; `lwz export runs/nano` writes them from a run")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for source in sources:
        figure = panel(pd.read_csv(source))
        for kind, metadata in (("svg", {"Date": None}), ("pdf", {"CreationDate": None}), ("png", {})):
            path = folder / f"{source.stem}_curves.{kind}"
            figure.savefig(path, metadata=metadata, dpi=150)
            drawn.append(path)
    return drawn
