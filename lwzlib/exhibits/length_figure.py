"""The kit's own exhibit: words asked for against words written, before and after training; (tables, ax) -> ax."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lwzlib.evaluate.length_control import length_table
from lwzlib.exhibits import figures
from lwzlib.exhibits.paper_figures import NOT_RUN, panels, runs_of, tag
from lwzlib.exhibits.results import Tables


def length_control(tables: Tables, ax: Axes) -> Axes:
    """`asked_against_written` of a setting's held-out samples, as high as its arms need."""
    ax.get_figure(root=True).set_figheight(0.6 + 1.2 * len(set(length_table(tables.held_out).arm)))  # type: ignore[union-attr]
    return asked_against_written(tables.held_out, ax)


def asked_panel(held_out: pd.DataFrame) -> Figure:
    """`asked_against_written` as a figure of its own, as high as its arms need."""
    figure = Figure(figsize=(6.8, 0.6 + 1.6 * held_out.arm.nunique()), layout="constrained")
    asked_against_written(held_out, figure.subplots())
    return figure


def asked_against_written(held_out: pd.DataFrame, ax: Axes) -> Axes:
    """A point a sample, a row of two panels an arm: before and after its training. The line is what was asked for; the title
    has the rank correlation with its 95% interval, and the mean of S_l. `held_out` as `run_tables.held_out_table` gives it."""
    summary = length_table(held_out)
    arms = [*(arm for arm in figures.ARMS if arm in set(summary.arm)), *sorted(set(summary.arm) - set(figures.ARMS))]
    if not arms:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, f"words asked for against words written: {NOT_RUN}", transform=ax.transAxes, ha="center", va="center",
                fontsize=7)
        return ax
    known, look = held_out.dropna(subset="asked_words"), figures.styles(arms)
    longest = 1.05 * max(known.asked_words.max(), known.answer_words.quantile(0.98))
    numbers = summary.set_index(["arm", "phase"])
    parts = iter(panels(ax, len(arms), 2))
    for arm in arms:
        for phase in ("before", "after"):
            part, rows = next(parts), known[(known.arm == arm) & (known.phase == phase)]
            part.plot([0, longest], [0, longest], color="0.6", linewidth=0.8)
            if len(rows):
                _points(part, rows, look[arm], longest, numbers.loc[arm, phase])
            part.set(xlim=(0, longest), ylim=(0, longest))
            part.tick_params(labelsize=6, labelleft=phase == "before", labelbottom=arm == arms[-1])
    ax.figure.supxlabel("asked for, words", fontsize=8)
    ax.figure.supylabel("written, words", fontsize=8)
    return ax


def _points(ax: Axes, rows: pd.DataFrame, look: tuple, longest: float, numbers: pd.Series) -> None:
    """Samples of one arm and phase; a text longer than the panel lies on its upper edge."""
    ranged = f"r {numbers.correlation:.2f}" + f" [{numbers.low:.2f}, {numbers.high:.2f}]" * bool(pd.notna(numbers.low))
    ranged = ranged if numbers.seeds else "no correlation"
    runs = {seed: runs_of(of_seed) for seed, of_seed in rows.groupby("seed")}
    tips = [f"{row['arm']}, {runs[row['seed']]}, {row['phase']}: {row['id']}, {row['asked_words']:.0f} words asked for, "
            f"{row['answer_words']:.0f} written" for row in rows.to_dict("records")]
    tag(ax.plot(rows.asked_words, rows.answer_words.clip(upper=longest), look[2], color=look[0], alpha=0.4, markersize=3,
                clip_on=False)[0], "measured", tips)
    ax.set_title(f"{rows.arm.iloc[0]}, {rows.phase.iloc[0]}\n{ranged}, S_l {numbers.S_l:.0f}", fontsize=6)
