"""Figures as pure functions of tables: (table, ax) -> ax. No network, no GPU, the same bytes every time.

Of GRPO: a row a step, with arm, seed, step and the columns of `metrics.jsonl`. Of the held-out queries: a row a sample.
What was not measured is a gap; an empty table draws nothing.
"""

import io
import itertools

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lwzlib.evaluate import intervals
from lwzlib.exhibits.run_tables import REWARDS

matplotlib.rcParams.update({"svg.hashsalt": "lwzlib", "svg.fonttype": "none", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
# Okabe and Ito's palette, safe for the colour-blind; dashes and markers keep the lines apart in grey.
STYLES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D"),
          ("#E69F00", (0, (5, 1)), "v"), ("#56B4E9", (0, (1, 1)), "P"), ("#000000", (0, (3, 1, 1, 1)), "X")]
# The paper's arms look alike in every figure: solid for RL, dashed for SFT, as in its Figure 4.
ARMS = {"base-nothink": ("#0072B2", "-", "o"), "base-think": ("#D55E00", "-", "s"),
        "continual-pretrain-think": ("#009E73", "-", "^"), "sft": ("#CC79A7", "--", "D"),
        "continual-pretrain-sft": ("#E69F00", "--", "v")}
LABELS = {"length": "length reward", "format": "format reward", "writing": "Writing RM score", "think_words": "plan, words",
          "answer_words": "answer, words", "completion_tokens": "completion, tokens", "truncated": "share truncated",
          "elo": "Elo, Bradley-Terry", "think_tokens": "plan, tokens", "answer_words_not_truncated": "whole answers, words",
          "loss": "loss, nats a token", "overlong": "overlong punishment"}


def styles(arms) -> dict[str, tuple]:
    """{arm: (colour, dash, marker)}, no two alike up to seven arms."""
    taken = {ARMS[arm][0] for arm in arms if arm in ARMS}
    free, others = [style for style in STYLES if style[0] not in taken], [arm for arm in arms if arm not in ARMS]
    return {arm: ARMS.get(arm) or free[others.index(arm) % len(free)] for arm in arms}


def curve(table: pd.DataFrame, ax: Axes, column: str, window: int = 5) -> Axes:
    """One quantity over the steps: a point a step, and each arm's centred mean over `window` steps; over several seeds
    the mean and the range."""
    look = styles(sorted(set(table.arm)))
    for i, (arm, rows) in enumerate(table.groupby("arm", sort=True)):
        colour, dash, marker = look[arm]
        per_seed = rows.pivot(index="step", columns="seed", values=column)
        smooth = per_seed.rolling(window, center=True, min_periods=1).mean()
        every = max(1, len(smooth) // 4)
        for seed in per_seed:
            ax.plot(per_seed.index, per_seed[seed], marker, color=colour, alpha=0.25, markersize=2.5)
        if smooth.shape[1] > 1:
            ax.fill_between(smooth.index, smooth.min(axis=1), smooth.max(axis=1), color=colour, alpha=0.12, linewidth=0)
        ax.plot(smooth.index, smooth.mean(axis=1), linestyle=dash, marker=marker, markevery=(i % every, every), markersize=4.5,
                color=colour, label=arm)
    ax.set(xlabel="step" if column == "loss" else "RL step", ylabel=LABELS.get(column, column))
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    if column in ("length", "format", "truncated"):
        ax.set_ylim(-0.03, 1.03)
    return ax


def mixture(table: pd.DataFrame, ax: Axes) -> Axes:
    """Share of each source in the tokens (bars) and what the recipe asks for (ticks); `table` as `mixture_table` gives it."""
    if table.empty:
        return ax
    places = range(len(table))[::-1]
    ax.barh(places, table.share, color=STYLES[5][0], height=0.55, label="packed")
    ax.plot(table.asked, places, "|", color="black", markersize=16, markeredgewidth=1.8, label="asked for")
    for place, row in zip(places, table.itertuples(), strict=True):
        ax.annotate(f"{row.share:.1%}", (max(row.share, row.asked), place), (6, 0), textcoords="offset points", va="center")
    ax.set_yticks(places, table.source)
    ax.set(xlabel="share of the tokens", xlim=(0, 1.15 * max(table.share.max(), table.asked.max())))
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)
    return ax


def boundaries(table: pd.DataFrame, ax: Axes, sequence_tokens: int) -> Axes:
    """Packed sequences, a row each, cut at the boundaries of their documents: columns sequence, source, tokens."""
    if table.empty:
        return ax
    sources, sequences = sorted(set(table.source)), list(dict.fromkeys(table.sequence))
    placed = table.assign(start=table.groupby("sequence").tokens.cumsum() - table.tokens)
    for i, source in enumerate(sources):
        rows = placed[placed.source == source]
        ax.barh([sequences.index(s) for s in rows.sequence], rows.tokens, left=rows.start, height=0.7, color=STYLES[i % 7][0],
                hatch=("", "//", "..", "xx")[i % 4], alpha=0.6, edgecolor="black", linewidth=1.2, label=source)
    ax.axvline(sequence_tokens, color="grey", linestyle=":", label="end of the sequence")
    ax.set_yticks(range(len(sequences)), sequences)
    ax.set(xlabel="tokens", ylabel="sequence", xlim=(0, 1.01 * sequence_tokens), ylim=(len(sequences) - 0.5, -0.5))
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=3, fontsize=8)
    return ax


def held_out(table: pd.DataFrame, ax: Axes, reward: str) -> Axes:
    """A held-out reward of each arm, before (open) and after (filled): means, 95% intervals. RL solid, SFT dashed."""
    arms = list(dict.fromkeys(table.arm))
    look = styles(arms)
    for place, arm in enumerate(arms):
        rows, (colour, _, marker) = table[table.arm == arm], look[arm]
        dash = "--" if (rows.algorithm == "sft").all() else "-"
        for phase, at, fill in (("before", place - 0.17, "white"), ("after", place + 0.17, colour)):
            if len(values := rows[rows.phase == phase][reward].dropna()):
                mean, low, high = intervals.bootstrap_mean(values)
                ax.plot([low, high], [at, at], linestyle=dash, color=colour, linewidth=1.4)
                ax.plot(mean, at, marker, color=colour, markerfacecolor=fill, markersize=5.5)
    ax.set_yticks(range(len(arms)), arms)
    ax.set(xlabel=LABELS[reward], ylim=(max(len(arms), 1) - 0.5, -0.5))
    if reward in ("length", "format"):
        ax.set_xlim(-0.04, 1.04)
    return ax


def roc(table: pd.DataFrame, ax: Axes) -> Axes:
    """One curve for each kind of repetition against the honest passages (kind `plain`): columns kind, score."""
    from sklearn.metrics import roc_curve

    honest = table[table.kind == "plain"].score
    for i, kind in enumerate(("copied", "reworded", "templated", "paraphrased by hand")):
        repeated = table[table.kind == kind].score
        if len(repeated):
            colour, dash, _ = STYLES[i]
            blamed, hit, _ = roc_curve([0] * len(honest) + [1] * len(repeated), [*honest, *repeated])
            ax.plot(blamed, hit, dash, color=colour, label=f"{kind} ({len(repeated)})")
    ax.set(xlabel=f"share of {len(honest)} honest passages blamed", ylabel="share of repetitions found", xlim=(-0.01, 0.5))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)
    return ax


def accuracy(quality: dict, ax: Axes) -> Axes:
    """Accuracy of a Writing RM by kind of pair, with its interval; `quality` as `train_writing_rm.quality` gives it."""
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
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda legend: len(legend[1]))
    figure.legend(handles, labels, loc="outside upper center", ncols=min(max(len(labels), 1), 4))
    return figure


def held_out_panel(table: pd.DataFrame) -> Figure:
    """`held_out` of each reward that was measured, side by side."""
    rewards = [name for name in REWARDS if name in table]
    figure = Figure(figsize=(7.4, 1.3 + 0.42 * table.arm.nunique()), layout="constrained")
    for i, reward in enumerate(rewards, 1):
        held_out(table, figure.add_subplot(1, len(rewards), i), reward)
        figure.axes[-1].tick_params(labelleft=i == 1)
    figure.suptitle("open: before, filled: after; solid: RL, dashed: SFT", fontsize=9)
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG text without a date, to stand inside a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg"):]


def required_against_written(table: pd.DataFrame, ax: Axes) -> Axes:
    """A point a prompt, on logarithmic scales; the line is what was asked for, the band where S_l is above 0. `table` as
    `longbench.lengths` gives it, with a column `model` for several; an answer without a word lies on the lower edge."""
    if table.empty:
        return ax
    span = np.array([table.required_words.min() / 2, table.required_words.max() * 2])
    lower, upper = span[0] / 4, span[1] * 4
    ax.fill_between(span, span / 3, span * 4, color="0.93", linewidth=0, label="S_l above 0")
    ax.plot(span, span, color="0.5", linewidth=1, label="as asked")
    models = table.groupby("model", sort=True) if "model" in table else [("written", table)]
    for (name, rows), (colour, _, marker) in zip(models, itertools.cycle(STYLES), strict=False):
        ax.plot(rows.required_words, rows.written_words.clip(lower, upper), marker, color=colour, alpha=0.5, markersize=4,
                linestyle="", label=name, clip_on=False)
    ax.set(xscale="log", yscale="log", xlim=span, ylim=(lower, upper), xlabel="required, words", ylabel="written, words")
    ax.legend(loc="upper left")
    return ax
