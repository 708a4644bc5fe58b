"""Ways to combine rewards, side by side: on made groups, and against the attacks of the hack suite.

`python -m lwzlib.lab.fusions` writes the tables and the picture of docs/rewards.md anew; the words around them stay.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lwzlib.base.pages import markdown_table, rewrite
from lwzlib.base.paths import DOCS
from lwzlib.base.recipe import Recipe, load_recipe
from lwzlib.lab import hacks
from lwzlib.method.advantage import Fusion, fuse
from lwzlib.method.rewards import build_rewards

PAGE, PICTURE = DOCS / "rewards.md", DOCS / "rewards.svg"
CLIP = 2.0  # where the recipe has none: a z-score beyond 2 is one failure among six or more
NOTHING = 0.005  # a gain that would be shown as 0.00
# (length, format) of eight completions: length spreads over 0.9; format differs by 0.05 only.
GROUP = np.array([[.1, 1.], [.9, .95], [.5, 1.], [1., .95], [.3, 1.], [.7, .95], [.9, 1.], [.2, .95]])
# The same lengths, and the longest one has broken its form.
BROKEN = np.stack([GROUP[:, 0], [1., 1., 1., 0., 1., 1., 1., 1.]], axis=1)
_COLOURS = {"sum": "#0072B2", "zscore": "#D55E00", "minmax": "#CC79A7", "gdpo": "#E69F00", "gate": "#56B4E9"}  # Okabe and Ito
_CLIPPED = "#009E73"
_STYLE = {"svg.hashsalt": "lwzlib", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False,
          "axes.spines.right": False, "legend.frameon": False}


def of(recipe: Recipe) -> dict[str, Fusion]:
    """{name: fusion} of each way that is compared, with the recipe's clip (`CLIP` if it has none) and its form."""
    plain = replace(Fusion.of(recipe), clip=0.0)
    clip = recipe.grpo.advantage_clip or CLIP
    return {"sum": replace(plain, mode="sum"), "zscore": replace(plain, mode="zscore"),
            f"zscore, clip {clip:g}": replace(plain, mode="zscore", clip=clip), "minmax": replace(plain, mode="minmax"),
            "gdpo": replace(plain, mode="gdpo"), "gate": replace(plain, mode="gate")}


def made_group(group: np.ndarray, fusions: dict[str, Fusion]) -> pd.DataFrame:
    """One row per completion of a group (completions, [length, format]): both rewards, and the advantage by each of `fusions`.
    The form holds where the format reward is above 0."""
    counts = np.stack([group[:, 1] > 0, np.full(len(group), True)], axis=1)
    table = pd.DataFrame(group, columns=["length", "format"], index=range(1, len(group) + 1)).rename_axis("completion")
    for name, way in fusions.items():
        table[name] = fuse(group[None], [1.0, 1.0], way.mode, way.clip, counts[None])[0]
    return table


def bars(table: pd.DataFrame, ax: Axes) -> Axes:
    """Bars of a `made_group`: for each completion its advantage by each way to combine."""
    names = list(table.columns[2:])
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        ax.bar(np.arange(len(table)) + width * (i - (len(names) - 1) / 2), table[name], width, label=name,
               color=_COLOURS.get(name, _CLIPPED))
    ax.set_xticks(range(len(table)), [f"{i}\nlen {row.length:.1f}\nfmt {row.format:.2f}" for i, row in table.iterrows()],
                  fontsize=7)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_ylabel("advantage")
    return ax


def gains(rewards: dict[str, Callable], weights, fusions: dict[str, Fusion], among: list[list[hacks.Honest]]) -> pd.DataFrame:
    """What each attack (rows) gets beyond the honest text that it was made from, by each of `fusions` (columns), as a mean over
    the groups; what pays best by the paper's way comes first."""
    table = hacks.fusion_table(rewards, weights, fusions, among=among)
    wide = table.pivot(index="attack", columns="fusion", values="difference")[list(fusions)]
    return wide.sort_values("zscore", ascending=False, kind="stable")


def shown(gain: float) -> str:
    """A signed number with two decimals, and no minus before a zero.

    >>> shown(-0.004), shown(1.5)
    ('+0.00', '+1.50')
    """
    return f"{round(gain, 2) + 0.0:+.2f}"


def picture(fusions: dict[str, Fusion], path: Path) -> None:
    """Write both made groups, one above the other, as SVG: the same bytes every time."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        for ax, group, title in zip(figure.subplots(2), (GROUP, BROKEN), ("every form holds", "completion 4 breaks its form"),
                                    strict=True):
            bars(made_group(group, fusions), ax).set_title(title, loc="left", fontsize=8)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=6, loc="outside upper center", fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def made_part(name: str) -> str:
    """Table of the page by the name in its mark, by the recipe nano without a Writing RM."""
    recipe = load_recipe("nano", {"reward.weights.writing": 0.0})
    tables = {"every form holds": lambda: made_group(GROUP, of(recipe)),
              "a broken form": lambda: made_group(BROKEN, of(recipe)),
              "hacks at the length": lambda: _hacked(recipe, 1), "hacks at a quarter": lambda: _hacked(recipe, 4)}
    return _markdown(tables[name]())


def _hacked(recipe: Recipe, times: int) -> pd.DataFrame:
    asked = load_recipe("nano", {"reward.weights.writing": 0.0, "reward.length.max_words": 400 * times})
    return gains(build_rewards(asked), [1.0, 1.0], of(recipe), hacks.asking(times, recipe.data.languages))


def _markdown(table: pd.DataFrame) -> str:
    rows = [[str(name), *(f"{value:.2f}" if column in ("length", "format") else shown(value)
                          for column, value in row.items())] for name, row in table.iterrows()]
    return markdown_table([table.index.name, *table.columns], rows, numbers=True)


if __name__ == "__main__":
    rewrite(PAGE, made_part)
    picture(of(load_recipe("nano")), PICTURE)
