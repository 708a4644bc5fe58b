"""What the rewards pay as a text grows and repeats itself: the maps and the sliders of notebook 02.

The texts are honest sentences of the kit, one after the other; the last of them give way to the first ones again. Whole
sentences are taken, so a text comes as near to the words it should have as they allow: the table says what it really has.
All texts of a table are scored by the rewards of training, and fused as if they were one group.
"""

import html
import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lwzlib.base.awaited import scores_of
from lwzlib.data.damage import fill, join
from lwzlib.lab import hacks
from lwzlib.method.advantage import PAPER, Fusion
from lwzlib.method.prompts import wrap
from lwzlib.method.text import count_words

PLAN = "Rain on a street at noon. Order: the street, the stalls, one buyer, the end."
_RANGES = {"length": (0, 1), "format": (0, 1)}  # those of the rewards that have bounds


def sentences() -> list[str]:
    """The kit's honest English sentences, about 500 words on four subjects; none repeats another."""
    return [sentence for group in hacks.groups() if group[0].language == "en" for sentence in group[0].sentences]


def text_of(words: int, repetition: float) -> tuple[list[str], list[str]]:
    """(new sentences, repeated sentences) of a text of about `words` words, of which a share `repetition`, in [0, 1), is
    repeated. Raises ValueError where that takes more new words than there are, and for any other share."""
    if not 0 <= repetition < 1:
        raise ValueError(f"repetition = {repetition} must be a share of the words, from 0 to below 1")
    known, new = sentences(), round(words * (1 - repetition))
    if new > (total := sum(map(count_words, known))):
        raise ValueError(f"{words} words with a share of {repetition:.2f} repeated need {new} new ones; there are {total}")
    fresh = fill(known, new)
    left = words - sum(map(count_words, fresh))
    again = fill(itertools.cycle(fresh), left) if repetition and left >= count_words(fresh[0]) / 2 else []
    return fresh, again


def reward_table(rewards: dict[str, Callable], word_range: tuple[int, int], words: list[int], repetitions: list[float],
          query: str = "", fusion: Fusion = PAPER) -> pd.DataFrame:
    """One row per pair of `words` and `repetitions`: both as wanted, `answer_words` and `repeated` as they came out (the
    latter in [0, 1]), each reward of `rewards` by its name, and `advantage` by `fusion`: all rows as one group, equal
    weights."""
    wanted = list(itertools.product(words, repetitions))
    parts = [text_of(*pair) for pair in wanted]
    completions = [wrap(PLAN, join(fresh + again), "think") for fresh, again in parts]
    columns = {"style": ["think"] * len(parts), "word_range": [word_range] * len(parts), "query": [query] * len(parts)}
    table = pd.DataFrame(wanted, columns=["words", "repetition"])
    table["answer_words"] = [sum(map(count_words, fresh + again)) for fresh, again in parts]
    table["repeated"] = [sum(map(count_words, again)) for _, again in parts] / table.answer_words
    for name, reward in rewards.items():
        table[name] = scores_of(reward, completions=completions, **columns)
    scores = table[list(rewards)].to_numpy(dtype=float)[None]
    table["advantage"] = fusion(scores, np.ones(len(rewards)), list(rewards), completions, "think")[0]
    return table


def surface(table: pd.DataFrame, ax: Axes, column: str, word_range: tuple[int, int]) -> Axes:
    """Map of one column of a `reward_table` over the wanted words and repetition; dashed: the range that the query states."""
    grid = table.pivot(index="repetition", columns="words", values=column)
    low, high = _RANGES.get(column, (None, None))
    picture = ax.pcolormesh(grid.columns, grid.index, grid, cmap="cividis", shading="nearest", vmin=low, vmax=high)
    for bound in word_range:
        ax.axvline(bound, color="white", linestyle="--", linewidth=1)
    ax.set(title=column, xlabel="words", ylabel="share repeated")
    ax.figure.colorbar(picture, ax=ax)
    return ax


def sliders(rewards: dict[str, Callable], word_range: tuple[int, int], most_words: int = 480):
    """An ipywidgets box: two sliders, a bar for each reward in [0, 1], and the text with what it repeats in bold."""
    import ipywidgets as widgets

    words = widgets.IntSlider(sum(word_range) // 2, 0, most_words, 10, description="words")
    share = widgets.FloatSlider(0, min=0, max=0.9, step=0.05, description="repeated")
    bars = {name: widgets.FloatProgress(min=0, max=1) for name in rewards}
    labels = {name: widgets.Label() for name in rewards}
    text = widgets.HTML()

    def update(_=None):
        row = reward_table(rewards, word_range, [words.value], [share.value]).iloc[0]
        for name in rewards:
            bars[name].value, labels[name].value = row[name], f"{name} {row[name]:.2f}"
        fresh, again = (html.escape(join(part)) for part in text_of(words.value, share.value))
        text.value = f"<p>{row.answer_words:.0f} words, {row.repeated:.0%} of them repeated</p><p>{fresh} <b>{again}</b></p>"

    for slider in (words, share):
        slider.observe(update, "value")
    update()
    return widgets.VBox([words, share, *(widgets.HBox([bars[name], labels[name]]) for name in rewards), text])
