"""Figures as pure functions of tables: (table, ax) -> ax. No network, no GPU, the same bytes every time.

Of GRPO: a row a step, with arm, seed, step and the columns of `metrics.jsonl`. Of the held-out queries: a row a sample.
What was not measured is a gap; an empty table draws nothing.
"""

import io
import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lwzlib import intervals
from lwzlib.runs import commit_of, read_rows

matplotlib.rcParams.update({"svg.hashsalt": "lwzlib", "svg.fonttype": "none", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
# Okabe and Ito's palette, safe for the colour-blind; dashes and markers keep the lines apart in grey.
STYLES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D"),
          ("#E69F00", (0, (5, 1)), "v"), ("#56B4E9", (0, (1, 1)), "P"), ("#000000", (0, (3, 1, 1, 1)), "X")]
# The paper's arms look alike in every figure: solid for RL, dashed for SFT, as in its Figure 4.
ARMS = {"base-nothink": ("#0072B2", "-", "o"), "base-think": ("#D55E00", "-", "s"),
        "continual-pretrain-think": ("#009E73", "-", "^"), "sft": ("#CC79A7", "--", "D"),
        "continual-pretrain-sft": ("#E69F00", "--", "v")}
REWARDS = ("length", "writing", "format")
LABELS = {"length": "length reward", "format": "format reward", "writing": "Writing RM score", "think_words": "plan, words",
          "answer_words": "answer, words", "completion_tokens": "completion, tokens", "truncated": "share truncated",
          "elo": "Elo, Bradley-Terry", "think_tokens": "plan, tokens", "answer_words_not_truncated": "whole answers, words",
          "loss": "loss, nats a token"}
_KEPT = ("length", "writing", "format", "think_words", "answer_words", "think_tokens", "answer_tokens", "completion_tokens",
         "answer_words_not_truncated", "truncated", "groups_without_variance", "entropy", "loss", "step_s")


def run_table(folder: str | Path) -> pd.DataFrame:
    """The GRPO rows of every arm in a run folder, each with its provenance. Empty if there are none."""
    tables = []
    for grpo in sorted(Path(folder).glob("*/grpo")):
        rows = pd.DataFrame(read_rows(grpo / "metrics.jsonl"))
        if rows.empty:
            continue
        about = made_by(grpo)
        kept = rows[["step", *(c for c in _KEPT if c in rows)]]
        tables.append(kept.assign(**about)[[*about, *kept.columns]])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["arm", "seed", "step"])


def made_by(stage: Path) -> dict:
    """Where the rows of an arm's stage come from."""
    made, status = (json.loads((stage / f"{name}.json").read_text()) for name in ("provenance", "status"))
    asked = yaml.safe_load((stage / "recipe.yaml").read_text())
    return {"model": asked["model"]["name"], "arm": stage.parent.name, "seed": asked["seed"],
            "fingerprint": status["fingerprint"], "commit": commit_of(made), "hardware": made["hardware"],
            "versions": " ".join(f"{name} {v}" for name, v in made["versions"].items())}


def held_out_table(folder: str | Path, during: bool = False) -> pd.DataFrame:
    """The held-out samples of every arm in a run folder, a row each: where they come from, judge (the Writing RM's identity),
    algorithm, start, phase (before, after; `during` RL too), step (of RL), id, rewards, lengths, texts. Empty if none."""
    found, known = [], list(ARMS)
    arms = {path.parent.name for path in Path(folder).glob("*/samples-*")}
    for arm in sorted(arms, key=lambda arm: (known.index(arm) if arm in known else len(known), arm)):
        for phase in ("before", *["during"] * during, "after"):
            stage = Path(folder) / arm / f"samples-{phase}"
            paths = sorted(stage.glob("samples*.jsonl"), key=lambda path: (len(path.stem), path.stem))
            if not paths:
                continue
            asked = yaml.safe_load((stage / "recipe.yaml").read_text())
            algorithm, start = (asked["inputs"].get(name, old) for name, old in (("algorithm", "grpo"), ("start", "base")))
            about = made_by(stage) | {"judge": judge_of(folder, asked, arm), "algorithm": algorithm, "start": start,
                                      "phase": phase}
            for path in paths:
                step = {"before": 0, "during": path.stem.rpartition("_")[2], "after": asked.get("grpo", {}).get("steps")}[phase]
                known_step = {"step": int(step) if algorithm == "grpo" else None}
                found += [about | row | known_step for row in read_rows(path)]
    return pd.DataFrame(found, columns=None if found else ["arm", "algorithm", "start", "seed", "phase", "step", "id"])


def judge_of(folder: str | Path, asked: dict, arm: str) -> str:
    """Identity of the Writing RM that scored an arm's samples, by the recipe of that stage; "" where none did."""
    reward = asked.get("reward", {})
    named = reward.get("writing", {}).get("model", "") if reward.get("weights", {}).get("writing") else ""
    places = [Path(folder) / arm / "writing-rm", Path(folder) / "writing-rm"]
    models = [place / "model" for place in places] if named == "stage" else [Path(named)]
    found = [model / "writing_rm.json" for model in models if (model / "writing_rm.json").is_file()]
    return json.loads(found[0].read_text())["identity"] if named and found else ""


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Of a held-out table: mean of each reward before and after, and the difference over the queries that have both,
    with its 95% interval. A row an arm and reward."""
    out = []
    for reward in (name for name in REWARDS if name in table):
        for arm, rows in table.groupby("arm", sort=False):
            pairs = rows.pivot(index="id", columns="phase", values=reward).reindex(columns=["before", "after"]).dropna()
            if len(pairs):
                difference, low, high = intervals.mean(pairs.after - pairs.before)
                out.append({"arm": arm, "reward": reward, "queries": len(pairs), "before": pairs.before.mean(),
                            "after": pairs.after.mean(), "difference": difference, "low": low, "high": high})
    return pd.DataFrame(out)


def mixture_table(pack: str | Path) -> pd.DataFrame:
    """A row a source of the packed shards: tokens, share, the share asked for, epochs (mean over shards). Empty if none."""
    shards = pd.DataFrame(read_rows(Path(pack) / "shards.jsonl"))
    if shards.empty:
        return pd.DataFrame(columns=["source", "tokens", "share", "asked", "epochs"])
    recipe = yaml.safe_load((Path(pack) / "recipe.yaml").read_text())
    chain = recipe["pretrain"]["cot_token_fraction"]
    weights = {f"{source['at']} ({source['language']})": source["weight"] for source in recipe["corpus"]["sources"]}
    asked = {name: (1 - chain) * weight / sum(weights.values()) for name, weight in weights.items()} | {"cot": chain}
    tokens, epochs = pd.DataFrame(list(shards.tokens)).sum(), pd.DataFrame(list(shards.epochs)).mean()
    return pd.DataFrame({"source": tokens.index, "tokens": tokens.astype(int), "share": tokens / tokens.sum(),
                         "asked": tokens.index.map(asked), "epochs": tokens.index.map(epochs)}).reset_index(drop=True)


def padding(pack: str | Path) -> float:
    """Share of the packed sequences that holds no token; NaN if nothing was packed."""
    rows = read_rows(Path(pack) / "shards.jsonl")
    return float(np.average([r["padding"] for r in rows], weights=[r["sequences"] for r in rows])) if rows else np.nan


def styles(arms) -> dict[str, tuple]:
    """{arm: (colour, dash, marker)}, no two alike up to seven arms."""
    taken = {ARMS[arm][0] for arm in arms if arm in ARMS}
    free, others = [style for style in STYLES if style[0] not in taken], [arm for arm in arms if arm not in ARMS]
    return {arm: ARMS.get(arm) or free[others.index(arm) % len(free)] for arm in arms}


def quarters(table: pd.DataFrame, columns=REWARDS) -> pd.DataFrame:
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
                mean, low, high = intervals.mean(values)
                ax.plot([low, high], [at, at], linestyle=dash, color=colour, linewidth=1.4)
                ax.plot(mean, at, marker, color=colour, markerfacecolor=fill, markersize=5.5)
    ax.set_yticks(range(len(arms)), arms)
    ax.set(xlabel=LABELS[reward], ylim=(max(len(arms), 1) - 0.5, -0.5))
    if reward != "writing":
        ax.set_xlim(-0.04, 1.04)
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
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
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
