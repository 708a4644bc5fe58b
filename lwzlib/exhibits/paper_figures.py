"""Figures 1 to 6 of the paper, published beside measured: (tables, ax) -> ax, `tables` of one setting.

Published: open black marks, and only where a number is known; the curves themselves are not published. Measured here: filled,
coloured, with lines; seeds as bands, 95% intervals over queries as bars. What was not run says so.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lwzlib.evaluate import elo
from lwzlib.exhibits.figures import ARMS, LABELS
from lwzlib.exhibits.results import Tables, judgments

PUBLISHED: dict = {"color": "black", "markerfacecolor": "none", "markeredgewidth": 1.1, "markersize": 7, "linestyle": "none"}
RL_ARMS = ("base-nothink", "base-think", "continual-pretrain-think")
WINDOW = 5  # steps of the centred mean
OPPONENTS = {"GPT-4.1": ("Llama-4-Scout", "DeepSeek-V3", "DeepSeek-R1", "Claude-Sonnet-4", "Gemini-2.5-Pro",
                         "Qwen3-235B-A22B"), "people": ("DeepSeek-R1", "Qwen3-235B-A22B")}
NOT_RUN = "not run here"


def tag(artist, kind: str, tips: list[str]):
    """Mark an artist as `published` or `measured`, with a sentence a point: the page makes tooltips and toggles of it."""
    artist.shown_as = (kind, tips)
    return artist


def figure_1(tables: Tables, ax: Axes) -> Axes:
    """Headline numbers: WritingBench average and Arena-Write Elo of each model."""
    table = tables.numbers("Table 1", "avg", "Elo")
    wide = table.pivot(index="model", columns="metric", values="value").sort_values(["Elo", "avg"], na_position="first")
    names, parts = ["this kit", *wide.index], panels(ax, 1, 2)
    for part, metric, label in zip(parts, ("avg", "Elo"), ("WritingBench", "Arena-Write Elo"), strict=True):
        known = table[table.metric == metric].set_index("model").reindex(wide.index).dropna(subset="value")
        tips = [_published_tip(row) for row in known.reset_index().to_dict("records")]
        tag(part.plot(known.value, [names.index(m) for m in known.index], "o", **PUBLISHED)[0], "published", tips)
        part.text(0.5, 0, NOT_RUN, transform=part.get_yaxis_transform(), ha="center", va="center", fontsize=7, color=_BLUE)
        part.set(ylim=(-0.7, len(names) - 0.4), yticks=range(len(names)), yticklabels=names)
        part.set_xlabel(label, fontsize=7)
        part.tick_params(labelleft=metric == "avg", labelsize=7)
        part.grid(axis="y", color="0.9")
        part.margins(x=0.1)
    return _legend(ax, [], tables)


def figure_2(tables: Tables, ax: Axes) -> Axes:
    """Writing RM score, length reward and length of whole answers over RL steps."""
    parts = panels(ax, 3)
    for part, column in zip(parts, ("writing", "length", "answer_words_not_truncated"), strict=True):
        _curves(tables.rl, part, column)
        part.set_xlabel("RL step" if part is parts[-1] else "")
    start = tables.numbers("Figure 2")
    if len(start):
        _publish(parts[0], 0, start.value.iloc[0], ARMS["base-think"][2], [_published_tip(start.iloc[0].to_dict())])
        parts[0].text(0.03, 0.02, "published: base-think starts near 0\n(on the scale of another RM)", fontsize=7, va="bottom",
                      transform=parts[0].transAxes)
        low, high = parts[0].get_ylim()
        parts[0].set_ylim(bottom=low - 0.4 * (high - low))  # room for the words
        if not len(parts[0].get_yticks()):
            parts[0].set_yticks([0])
    return _legend(ax, RL_ARMS, tables)


def figure_3(tables: Tables, ax: Axes) -> Axes:
    """Elo over the course of RL: the published ends of the curves, and the embedded arena here."""
    published = _two_scales(tables, ax, RL_ARMS, "share of RL, %")
    for end, x in (("Elo_start", 0), ("Elo_end", 100)):
        for row in tables.numbers("Figure 3", end).to_dict("records"):
            _publish(published, x, row["value"], ARMS[row["model"]][2], [_published_tip(row)], _ABOUT[row["qualifier"]])
    return _legend(ax, RL_ARMS, tables)


def figure_4(tables: Tables, ax: Axes) -> Axes:
    """RL (solid) against SFT (dashed), from the base model and after continual pretraining."""
    arms = [arm for arm in ARMS if arm != "base-nothink"]
    published = _two_scales(tables, ax, arms, "share of training, %")
    for row in tables.numbers("Figure 4").to_dict("records"):
        _publish(published, 100, row["value"], ARMS[row["model"]][2], [_published_tip(row)], "",
                 {"sft": -4, "continual-pretrain-sft": 4}.get(row["model"], 0))
    published.margins(y=0.12)  # room for the lowest number above the axis
    return _legend(ax, arms, tables)


def figure_5(tables: Tables, ax: Axes) -> Axes:
    """Wins, ties and losses of the last arm against others (the paper draws donuts)."""
    rows: list[tuple[str, dict | str | None]] = [("published: all eight", "range")]
    rows += [(f"{name}, {judge}", None) for judge, names in OPPONENTS.items() for name in names]
    last, pairs = _last_arm(tables)
    rows += [(f"{last} against:", "heading")] * bool(last)
    rows += [(name, pair) for name, pair in pairs] or [("this kit: its arms", None)]
    low, high = (tables.numbers("Figure 5", f"win_rate_{end}").value.squeeze() for end in ("min", "max"))
    for place, (_, what) in enumerate(rows):
        if isinstance(what, dict):
            _win_bar(ax, place, what, tables)
        elif what == "heading":
            continue
        elif what is None:
            text = NOT_RUN if place > len(rows) - 2 else f"not published; {NOT_RUN}"
            ax.text(50, place, text, ha="center", va="center", fontsize=7, color="0.35")
        else:
            ends = f"published: win rate at most {high}%, at least above {low}%"
            line, = ax.plot([low, high], [place, place], "|-", color="black", markersize=9, linewidth=1)
            tag(line, "published", [ends] * 2)
            ax.annotate(f"{low:.0f} to {high:.1f}%", (low, place), (-5, 0), textcoords="offset points", ha="right", va="center",
                        fontsize=7)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    ax.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), xlabel="judgments, %")
    looks = [*(Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name) for name, colour, hatch in _OUTCOMES),
             Line2D([], [], color="black", marker=".", label="win rate, 95%")]
    ax.figure.legend(handles=looks, loc="outside upper center", ncols=4, fontsize=7, handlelength=1.2, columnspacing=1)
    return ax


def figure_6(tables: Tables, ax: Axes) -> Axes:
    """Length of the plan over RL steps, on a logarithmic scale: the published plateau is a hundred times higher."""
    plans = tables.rl[tables.rl.arm.isin(RL_ARMS[1:])]
    ax.set_yscale("symlog", linthresh=1)  # a plan may be empty
    low, high = (tables.numbers("Figure 6", f"plateau_{end}").value.squeeze() for end in ("low", "high"))
    tip = f"published: plateau of about {low:,.0f} to {high:,.0f} think tokens; continual pretraining longer"
    tag(ax.axhspan(low, high, facecolor="none", edgecolor="black", hatch="////", linewidth=0.6), "published", [tip])
    ax.annotate("published plateau", (0.97, low), (0, -4), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                ha="right", va="top", fontsize=7)
    _curves(plans, ax, "think_tokens")
    ax.set(xlabel="RL step", ylim=(0, 9000))
    return _legend(ax, RL_ARMS[1:], tables)


_BLUE = ARMS["base-nothink"][0]
_ABOUT = {"exact": "", "about": "~", "near": "~", "above": ">", "at most": "<="}
_OUTCOMES = (("win", "#0072B2", ""), ("tie", "0.8", ""), ("loss", "#E69F00", "////"))


def panels(ax: Axes, rows: int, columns: int = 1) -> list[Axes]:
    """Several axes in the place of one."""
    ax.set_axis_off()
    place = ax.get_subplotspec()
    assert place, "an exhibit is drawn on axes of a grid, as subplots() makes them"
    grid = place.subgridspec(rows, columns)
    return [ax.figure.add_subplot(grid[i]) for i in range(rows * columns)]


def _published_tip(row: dict) -> str:
    how = "" if row["qualifier"] == "exact" else f"{row['qualifier']} "
    who = f"{row['model']}, " if row.get("model") else ""
    return f"published ({row['confidence']}): {who}{row['metric']} {how}{row['value']:g}; {row['source']}"


def _publish(ax: Axes, x: float, y: float, marker: str, tips: list[str], qualifier: str | None = None,
             up: float = 0) -> None:
    """A published mark; with `qualifier`, its value beside it, `up` points higher."""
    tag(ax.plot([x], [y], marker, clip_on=False, zorder=5, **PUBLISHED)[0], "published", tips)
    if qualifier is not None:
        ax.annotate(f"{qualifier}{y:.0f}", (x, y), (7 if x < 50 else -7, up), textcoords="offset points", fontsize=7,
                    va="center", ha="left" if x < 50 else "right")


def _curves(table: pd.DataFrame, ax: Axes, column: str) -> None:
    """A point a step and seed, the mean over seeds and five steps as a line, the range of the seeds as a band."""
    drawn = False
    for arm in (arm for arm in RL_ARMS if column in table and table[table.arm == arm][column].notna().any()):
        rows, (colour, dash, marker), drawn = table[table.arm == arm].dropna(subset=column), ARMS[arm], True
        tips = [f"{row['arm']}, seed {row['seed']}, commit {_short(row['commit'])}, {row['setting']}: step {row['step']}, "
                f"{LABELS.get(column, column)} {row[column]:.3g}" for row in rows.to_dict("records")]
        tag(ax.plot(rows.step, rows[column], marker, color=colour, alpha=0.3, markersize=2.5)[0], "measured", tips)
        smooth = rows.pivot(index="step", columns="seed", values=column).rolling(WINDOW, center=True, min_periods=1).mean()
        every, runs = max(1, len(smooth) // 4), f"{arm}, {runs_of(rows)}"
        if smooth.shape[1] > 1:
            tag(ax.fill_between(smooth.index, smooth.min(axis=1), smooth.max(axis=1), color=colour, alpha=0.18, linewidth=0),
                "measured", [f"{runs}: range of the seeds"])
        tag(ax.plot(smooth.index, smooth.mean(axis=1), dash, color=colour, marker=marker, markersize=4, markevery=every)[0],
            "measured", [f"{runs}: mean over {WINDOW} steps around step {step}, {value:.3g}"
                         for step, value in smooth.mean(axis=1)[::every].items()])
    ax.set_ylabel({"answer_words_not_truncated": "whole answers,\nwords"}.get(column, LABELS.get(column, column)))
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    if column == "length":
        ax.set_ylim(-0.03, 1.03)
    if drawn:
        ax.set_xlim(left=0)
    else:
        ax.text(0.5, 0.5, NOT_RUN, transform=ax.transAxes, ha="center", va="center")
        ax.set(xlim=(0, 1), xticks=[])
        if ax.get_yscale() == "linear":
            ax.set(ylim=(-1, 3), yticks=[])


def _two_scales(tables: Tables, ax: Axes, arms, xlabel: str) -> Axes:
    """Two axes, since the Elo of two arenas cannot be compared: the one for what is published (returned), and one here."""
    published, here = parts = panels(ax, 1, 2)
    published.set_title("published, 32B:\nArena-Write", fontsize=7)
    here.set_title("here, embedded arena:\nown Writing RM judges", fontsize=7, color=_BLUE)
    for part in parts:
        part.set(xlim=(-7, 107), xticks=[0, 50, 100])
        part.set_xlabel(xlabel, fontsize=7)
        part.tick_params(labelsize=7)
    published.set_ylabel("Elo")
    if not _elo_lines(tables, here, arms):
        here.text(0.5, 0.5, NOT_RUN, transform=here.transAxes, ha="center", va="center")
        here.set_yticks([])
    return published


def _elo_lines(tables: Tables, ax: Axes, arms) -> bool:
    """Elo of the embedded arena over the share of the training (SFT has its two ends); whether any arm was there."""
    ratings = tables.elo
    arms = [arm for arm in arms if arm in set(ratings.arm)]
    for i, arm in enumerate(arms):
        (colour, dash, marker), rows = ARMS[arm], ratings[(ratings.arm == arm) & np.isfinite(ratings.elo)]
        origin = f"{arm}, {runs_of(tables.held_out[tables.held_out.arm == arm])}"
        at = 100 * rows.step.fillna(np.inf) / rows.step.max() if rows.step.max() > 0 else 100.0 * rows.step.isna()
        at = at.clip(0, 100) + 2 * (i - (len(arms) - 1) / 2)  # beside each other, not on top
        if rows.seed_low.notna().any():
            tag(ax.fill_between(at, rows.seed_low, rows.seed_high, color=colour, alpha=0.18, linewidth=0), "measured",
                [f"{origin}: range of the seeds' own ratings"])
        bars = ax.errorbar(at, rows.elo, yerr=[rows.elo - rows.low, rows.high - rows.elo], fmt="none", ecolor=colour,
                           elinewidth=0.8, alpha=0.6)
        tag(bars.lines[2][0], "measured", [f"{origin}: 95% interval over queries"])
        tag(ax.plot(at, rows.elo, dash, color=colour, marker=marker, markersize=4.5)[0], "measured",
            [f"{origin}: {'after SFT' if pd.isna(row.step) else f'step {row.step:.0f}'}, Elo {row.elo:.0f} "
             f"[{row.low:.0f}, {row.high:.0f}], embedded arena, {row.anchor} = 1000" for row in rows.itertuples()])
    if endless := int((~np.isfinite(ratings[ratings.arm.isin(arms)].elo)).sum()):
        ax.text(0.5, 0.02, f"{endless} not finite", transform=ax.transAxes, ha="center", fontsize=7)
    return bool(arms)


def _short(commit: str | None) -> str:
    return commit[:9] + commit[40:] if commit else "unknown"  # and its +


def runs_of(table: pd.DataFrame) -> str:
    """Seeds and commits of rows."""
    seeds, commits = sorted(set(table.seed)), sorted({_short(commit) for commit in table.commit})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, commit {', '.join(commits)}"


def _last_arm(tables: Tables) -> tuple[str, list[tuple[str, dict]]]:
    """The furthest trained arm, and its wins, ties and losses against every other arm's end."""
    ends = {arm: f"{arm}@{rows.step.max():.0f}" if rows.step.notna().all() else f"{arm} after"
            for arm, rows in tables.elo.groupby("arm")}
    last = next((arm for arm in (RL_ARMS[2], RL_ARMS[1]) if arm in ends), "")
    if not last:
        return "", []
    judged = judgments(tables.held_out)
    pairs = elo.win_tie_loss(judged, ends[last]).set_index("other")
    return last, [(arm, pairs.loc[end].to_dict()) for arm, end in ends.items() if end in pairs.index and arm != last]


def _win_bar(ax: Axes, place: float, pair: dict, tables: Tables) -> None:
    counts = [pair[name] for name in ("wins", "ties", "losses")]
    total, left = sum(counts), 0.0
    origin = runs_of(tables.held_out)
    for (name, colour, hatch), count in zip(_OUTCOMES, counts, strict=True):
        bar = ax.barh(place, 100 * count / total, left=left, height=0.62, color=colour, hatch=hatch, edgecolor="white")[0]
        tag(bar, "measured", [f"{name}: {count} of {total} judgments by the Writing RM; {origin}"])
        left += 100 * count / total
    rate, low, high = (100 * pair[name] for name in ("win_rate", "low", "high"))
    tag(ax.plot([low, high], [place, place], color="black", linewidth=1.2)[0], "measured", [f"95% over queries; {origin}"] * 2)
    tag(ax.plot([rate], [place], "o", color="black", markersize=4)[0], "measured",
        [f"win rate {rate:.0f}% [{low:.0f}, {high:.0f}], ties half; {origin}"])


def _legend(ax: Axes, arms, tables: Tables) -> Axes:
    """Legend: what is published first, then the arms that were measured."""
    known = {*tables.rl.arm, *tables.held_out.arm}
    looks = [Line2D([], [], marker="o", label="published", **PUBLISHED)]
    looks += [Line2D([], [], color=ARMS[arm][0], linestyle=ARMS[arm][1], marker=ARMS[arm][2], markersize=4, label=arm)
              for arm in arms if arm in known]
    ax.figure.legend(handles=looks, loc="outside upper center", ncols=2, fontsize=7, columnspacing=1)
    return ax
