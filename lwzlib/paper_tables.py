"""Tables 1 to 5 of the paper, published beside measured: tables -> DataFrame, `tables` of one setting.

The first column, `source`, is `published` or `measured`; a cell that is neither published nor run here is empty. `draw` sets
such a frame: published upright in black, measured in blue on a tint.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from lwzlib import figures
from lwzlib.results import Tables

METRICS = ["avg", "D1", "D2", "D3", "D4", "D5", "D6", "style", "format", "length", "Elo"]
SHORT = {"without continual pretraining": "without CPT"}
NOT_RUN = "not run here"


def table_1(tables: Tables) -> pd.DataFrame:
    """WritingBench and Arena-Write, with the ablations of thinking and continual pretraining."""
    said = tables.published[(tables.published.exhibit == "Table 1") & tables.published.metric.isin(METRICS)]
    rows = [{"source": "published", "model": SHORT.get(model, model), "params": of.params.iloc[0] or ""}
            | {row.metric: f"{row.value:.2f}" if row.metric == "avg" else f"{row.value:g}" if row.metric == "Elo"
               else f"{row.value:.1f}" for row in of.itertuples()} for model, of in said.groupby("model", sort=False)]
    rows.append({"source": "measured", "model": _kit(tables), "avg": f"WritingBench, Arena-Write: {NOT_RUN}"})
    found = tables.elo.set_index("arm") if len(tables.elo) else tables.elo
    for arm in ("continual-pretrain-think", "base-think", "base-nothink"):
        if arm in found.index:
            end = found.loc[[arm]].iloc[-1]
            elo = _ranged(end, "elo", 0) if np.isfinite(end.elo) else "not finite"
            rows.append({"source": "measured", "model": arm, "avg": f"embedded arena, Elo {elo}"})
    return pd.DataFrame(rows, columns=["source", "model", "params", *METRICS]).fillna("")


def table_2(tables: Tables) -> pd.DataFrame:
    """Pretraining mixture. The paper's shares are not known to this kit, its totals are."""
    method = tables.published[tables.published.exhibit == "Method"].set_index("metric").value
    rows = [{"source": "published", "of": "all sources", "tokens": f"{method['pretrain.tokens'] / 1e9:g}B", "share": "100%"},
            {"source": "published", "of": "long chain-of-thought", "share": f"{method['pretrain.cot_token_fraction']:.0%}"},
            {"source": "published", "of": "books, reports, papers", "share": "not known"}]
    for seed, of in tables.mixture.groupby("seed"):
        rows += [{"source": "measured", "of": f"{row['source']}, seed {seed}", "tokens": f"{row['tokens']:,}",
                  "share": f"{row['tokens'] / of.tokens.sum():.1%}"} for row in of.to_dict("records")]
    if tables.mixture.empty:
        rows.append({"source": "measured", "of": _kit(tables), "tokens": NOT_RUN})
    return pd.DataFrame(rows, columns=["source", "of", "tokens", "share"]).fillna("")


def table_3(tables: Tables) -> pd.DataFrame:
    """Size of the base model. The paper's 14B scores are not known to this kit."""
    said = tables.published[(tables.published.model == "LongWriter-Zero")].set_index("metric").value
    rows = [{"source": "published", "model": "Qwen2.5-32B", "WritingBench": f"{said['avg']:.2f}",
             "Arena-Write": f"{said['Elo']:.0f}"},
            {"source": "published", "model": "Qwen2.5-14B", "WritingBench": "not known"}]
    models = sorted({*tables.rl.model, *tables.held_out.model})
    rows += [{"source": "measured", "model": name, "WritingBench": NOT_RUN} for name in models or ["this kit"]]
    return pd.DataFrame(rows, columns=["source", "model", "WritingBench", "Arena-Write"]).fillna("")


def table_4(tables: Tables) -> pd.DataFrame:
    """SFT on LongWriter's data. The paper's scores are not known to this kit; here SFT learns from other data."""
    rows = [{"source": "published", "arm": "32B, SFT on LongWriter-6k", "reward": "not known"}]
    held_out = tables.held_out[tables.held_out.algorithm == "sft"]
    for seed, of in held_out.groupby("seed"):
        for row in figures.changes(of).to_dict("records"):
            rows.append({"source": "measured", "arm": f"{row['arm']}, seed {seed}", "reward": row["reward"],
                         "before": f"{row['before']:.2f}", "after": f"{row['after']:.2f}",
                         "change": _ranged(row, "difference", 2, "+")})
    if held_out.empty:
        rows.append({"source": "measured", "arm": _kit(tables), "reward": NOT_RUN})
    return pd.DataFrame(rows, columns=["source", "arm", "reward", "before", "after", "change"]).fillna("")


def table_5(tables: Tables) -> pd.DataFrame:
    """LongBench-Write. Neither the paper's scores are known to this kit, nor was the benchmark run."""
    rows = [{"source": "published", "model": "LongWriter-Zero", "S": "not known"},
            {"source": "measured", "model": _kit(tables), "S": NOT_RUN}]
    return pd.DataFrame(rows, columns=["source", "model", "S", "S_l", "S_q"]).fillna("")


def draw(table: pd.DataFrame, ax: Axes) -> Axes:
    """Set a frame of text between three rules. A cell may run over the empty ones to its right."""
    shown = table.drop(columns="source")
    chars = [_chars(shown, i) for i in range(len(shown.columns))]
    starts, lines = [sum(chars[:i]) for i in range(len(chars))], len(shown) + 1
    size = min(7.5, 3.3 * 72 / sum(chars) / 0.56)
    ax.set(xlim=(0, sum(chars)), ylim=(lines + 0.1, -0.1))
    ax.set_axis_off()
    for i, (_, row) in enumerate(table.iterrows(), 1):
        colour = "black" if row.source == "published" else figures.STYLES[0][0]
        if row.source == "measured":
            ax.add_patch(Rectangle((0, i), sum(chars), 1, facecolor="#e8f1f8", linewidth=0))
        for start, name in zip(starts, shown, strict=True):
            ax.text(start, i + 0.5, row[name], color=colour, fontsize=size, va="center")
    for start, name in zip(starts, shown, strict=True):
        ax.text(start, 0.5, name, fontsize=size, va="center", weight="bold")
    for y, width in ((0, 1), (1, 0.6), (lines, 1)):
        ax.axhline(y, color="black", linewidth=width)
    return ax


def _chars(shown: pd.DataFrame, i: int) -> float:
    """Width of a column: its heading, which is bold, and the cells that cannot run over empty ones to their right."""
    name, rests = shown.columns[i], shown.iloc[:, i + 1 :].to_numpy()
    cells = [len(cell) for cell, rest in zip(shown[name], rests, strict=True) if any(rest) or not len(rest)]
    return max([1.25 * len(name), *cells]) + 1.4


def _kit(tables: Tables) -> str:
    found = sorted({*tables.rl.setting, *tables.held_out.setting, *tables.mixture.setting})
    return f"this kit, {found[0]}" if found else "this kit"


def _ranged(row, name: str, digits: int, sign: str = "") -> str:
    return f"{row[name]:{sign}.{digits}f} [{row['low']:{sign}.{digits}f}, {row['high']:{sign}.{digits}f}]"
