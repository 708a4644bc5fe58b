"""Every exhibit of the paper as PDF, SVG and PNG, from committed numbers alone: no network, no GPU, the same bytes each time.

One set for each setting that has rows of the paper's arms; without any rows, one set of what is published.
"""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lwzlib.exhibits import figures, paper_figures
from lwzlib.exhibits.results import Tables
from lwzlib.exhibits.run_tables import held_out_changes

WIDTH_IN = 3.5  # one column
_SVG = "http://www.w3.org/2000/svg"
_UNDATED = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
            "png": {"Software": None}}
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
_SCORES = ["avg", "D1", "D2", "D3", "D4", "D5", "D6", "style", "format", "length", "Elo"]  # of Table 1
SHORT = {"without continual pretraining": "without CPT"}
NOT_RUN = "not run here"


class Exhibit(NamedTuple):
    """A figure, whose `make` is (tables, ax) -> ax, or a table, whose `make` is tables -> DataFrame and whose height follows
    from its rows. `note` says what a reader must know."""

    name: str
    title: str
    make: Callable
    height_in: float
    note: str

    @property
    def is_table(self) -> bool:
        """Whether it is a table, whose rows are written as CSV too."""
        return self.name.startswith("table")


def table_1(tables: Tables) -> pd.DataFrame:
    """WritingBench and Arena-Write, with the ablations of thinking and continual pretraining."""
    published = tables.published[(tables.published.exhibit == "Table 1") & tables.published.metric.isin(_SCORES)]
    digits, rows = {"avg": ".2f", "Elo": "g"}, []
    for model, scores in published.groupby("model", sort=False):
        cells = {row.metric: f"{row.value:{digits.get(row.metric, '.1f')}}" for row in scores.itertuples()}
        rows.append({"source": "published", "model": SHORT.get(model, model), "params": scores.params.iloc[0] or ""} | cells)
    rows.append({"source": "measured", "model": _kit(tables), "avg": f"WritingBench, Arena-Write: {NOT_RUN}"})
    ratings = tables.elo.set_index("arm") if len(tables.elo) else tables.elo
    for arm in ("continual-pretrain-think", "base-think", "base-nothink"):
        if arm in ratings.index:
            end = ratings.loc[[arm]].iloc[-1]
            elo = _ranged(end, "elo", 0) if np.isfinite(end.elo) else "not finite"
            rows.append({"source": "measured", "model": arm, "avg": f"embedded arena, Elo {elo}"})
    return pd.DataFrame(rows, columns=["source", "model", "params", *_SCORES]).fillna("")


def table_2(tables: Tables) -> pd.DataFrame:
    """Pretraining mixture. The paper's shares are not known to this kit, its totals are."""
    method = tables.published[tables.published.exhibit == "Method"].set_index("metric").value
    rows = [{"source": "published", "of": "all sources", "tokens": f"{method['pretrain.tokens'] / 1e9:g}B", "share": "100%"},
            {"source": "published", "of": "long chain-of-thought", "share": f"{method['pretrain.cot_token_fraction']:.0%}"},
            {"source": "published", "of": "books, reports, papers", "share": "not known"}]
    for seed, sources in tables.mixture.groupby("seed"):
        rows += [{"source": "measured", "of": f"{row['source']}, seed {seed}", "tokens": f"{row['tokens']:,}",
                  "share": f"{row['tokens'] / sources.tokens.sum():.1%}"} for row in sources.to_dict("records")]
    if tables.mixture.empty:
        rows.append({"source": "measured", "of": _kit(tables), "tokens": NOT_RUN})
    return pd.DataFrame(rows, columns=["source", "of", "tokens", "share"]).fillna("")


def table_4(tables: Tables) -> pd.DataFrame:
    """SFT on LongWriter's data. The paper's scores are not known to this kit; here SFT learns from other data."""
    rows = [{"source": "published", "arm": "32B, SFT on LongWriter-6k", "reward": "not known"}]
    held_out = tables.held_out[tables.held_out.algorithm == "sft"]
    for seed, samples in held_out.groupby("seed"):
        for row in held_out_changes(samples).to_dict("records"):
            rows.append({"source": "measured", "arm": f"{row['arm']}, seed {seed}", "reward": row["reward"],
                         "before": f"{row['before']:.2f}", "after": f"{row['after']:.2f}",
                         "change": _ranged(row, "difference", 2, "+")})
    if held_out.empty:
        rows.append({"source": "measured", "arm": _kit(tables), "reward": NOT_RUN})
    return pd.DataFrame(rows, columns=["source", "arm", "reward", "before", "after", "change"]).fillna("")


def draw_table(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a frame of text between three rules. A cell may run over the empty ones to its right."""
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
    settings = sorted({*tables.rl.setting, *tables.held_out.setting, *tables.mixture.setting})
    return f"this kit, {settings[0]}" if settings else "this kit"


def _ranged(row, name: str, digits: int, sign: str = "") -> str:
    return f"{row[name]:{sign}.{digits}f} [{row['low']:{sign}.{digits}f}, {row['high']:{sign}.{digits}f}]"


_ARENA = ("Here: the embedded arena. The judge is the Writing RM that the arms were trained on, so it shows what they learnt, "
          "not how well they write; Elo is Bradley-Terry by maximum likelihood; the no-think arm before RL stands at 1000, or "
          "else the first by name.")
EXHIBITS = {exhibit.name: exhibit for exhibit in (
    Exhibit("figure_1", "Figure 1 · Headline scores", paper_figures.figure_1, 2.9,
            "What the paper's Figure 1 looks like is not in this kit's sources: these are headline numbers of its Table 1."),
    Exhibit("figure_2", "Figure 2 · Rewards and length over RL steps", paper_figures.figure_2, 5.4,
            "The paper's curves are published without values. Here: a point a step and seed, lines are means over five steps, "
            "bands the range of the seeds. Whole answers: those that did not overrun the limit."),
    Exhibit("figure_3", "Figure 3 · Elo over RL steps", paper_figures.figure_3, 3.0,
            f"Published: the ends of three curves, as described. {_ARENA} Bars: 95% over queries; bands: range of the seeds."),
    Exhibit("figure_4", "Figure 4 · RL against SFT", paper_figures.figure_4, 3.1,
            f"Solid: RL; dashed: SFT. Published: the ends. {_ARENA} RL maximises this judge's score and SFT does not."),
    Exhibit("figure_5", "Figure 5 · Wins, ties, losses", paper_figures.figure_5, 3.9,
            f"The paper draws eight donuts; known are the highest win rate and a bound of the lowest. {_ARENA}"),
    Exhibit("figure_6", "Figure 6 · Length of the plan over RL steps", paper_figures.figure_6, 2.8,
            "Published: a plateau of about 2,000 to 3,000 tokens, longer after continual pretraining. Logarithmic scale."),
    Exhibit("table_1", "Table 1 · WritingBench, Arena-Write and ablations", table_1, 0,
            "CPT: continual pretraining; without it: Base-think; without thinking: Base-nothink. D1 Academic & Engineering, "
            "D2 Finance & Business, D3 Politics & Law, D4 Literature & Art, D5 Education, D6 Advertising & Marketing. "
            f"{_ARENA} It cannot be compared with Arena-Write."),
    Exhibit("table_2", "Table 2 · Pretraining mixture", table_2, 0,
            "The paper's shares are not in this kit's sources."),
    Exhibit("table_4", "Table 4 · SFT on long answers", table_4, 0,
            "The paper's scores are not in this kit's sources. Here SFT learns from the model's own best answers and "
            "human passages, not from LongWriter's data; "
            "intervals: 95% over queries."),
)}


def settings(tables: Tables) -> list[str]:
    """Settings that have rows of the paper's arms; [""], for what is published alone, if there are none."""
    arms = {name: {*tables.of(name).rl.arm, *tables.of(name).held_out.arm} for name in tables.settings}
    return [name for name in tables.settings if arms[name] & set(figures.ARMS)] or [""]


def draw_exhibit(exhibit: Exhibit, tables: Tables) -> Figure:
    """Figure of one exhibit in one setting, at the width of a column."""
    figure = Figure(figsize=(WIDTH_IN, exhibit.height_in), layout="constrained")
    ax = figure.subplots()
    if exhibit.is_table:
        table = exhibit.make(tables)
        figure.set_figheight(0.2 * (len(table) + 1) + 0.1)
        draw_table(table, ax)
    else:
        exhibit.make(tables, ax)
    figure.draw_without_rendering()  # lays it out, once for all formats
    figure.set_layout_engine("none")
    return figure


def write_exhibits(tables: Tables, folder: Path) -> list[Path]:
    """Write all exhibits, and the curves of every setting, into `folder`; tables as CSV too. What an earlier call left there
    and this one does not write is removed: no old number stays."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for setting in settings(tables):
        measured = tables.of(setting)
        for exhibit in EXHIBITS.values():
            stem = f"{exhibit.name}_{setting}".rstrip("_")
            wanted[stem] = draw_exhibit(exhibit, measured)
            if exhibit.is_table:
                exhibit.make(measured).to_csv(folder / f"{stem}.csv", index=False)
    for setting in tables.settings:
        if len(rows := tables.of(setting).rl):
            wanted[f"{setting}_curves"] = figures.panel(rows)
    written = [path for stem, figure in wanted.items() for path in _save(figure, folder / stem)]
    kept = {path.name for path in written} | {f"{stem}.csv" for stem in wanted if stem.startswith("table")}
    record = folder / ".exhibits"  # what is removed is ours: other files in the folder stay
    for name in set(record.read_text().splitlines() if record.exists() else []) - kept:
        (folder / name).unlink(missing_ok=True)
    record.write_text("\n".join(sorted(kept)))
    return written


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in _UNDATED]
    for path, metadata in zip(paths, _UNDATED.values(), strict=True):
        figure.savefig(path, metadata=metadata, dpi=300 if path.suffix == ".png" else "figure")
    return paths


def interactive(figure: Figure, name: str, title: str) -> str:
    """SVG of a figure for a page: classes `published` and `measured`, and a tooltip for each point."""
    tagged: list = figure.findobj(lambda artist: hasattr(artist, "shown_as"))
    for number, artist in enumerate(tagged):
        artist.set_gid(f"{name}-{number}")
    root = ET.fromstring(figures.svg(figure))
    root.attrib |= {"role": "img", "aria-label": title}
    groups = {group.get("id"): group for group in root.iter(f"{{{_SVG}}}g")}
    for artist in tagged:
        kind, tips = artist.shown_as
        if (group := groups.get(artist.get_gid())) is None:
            continue
        group.set("class", kind)
        points = list(group.iter(f"{{{_SVG}}}use"))
        for point, tip in zip(points or [group], tips if points else tips[:1], strict=len(points) == len(tips)):
            title_of = ET.Element(f"{{{_SVG}}}title")
            title_of.text = tip
            point.insert(0, title_of)
            point.set("data-point", "")
    return ET.tostring(root, encoding="unicode")


def numbers(figure: Figure) -> pd.DataFrame:
    """Points of a figure as text, a row each: for those who cannot see it, or want to copy it."""
    tagged: list = figure.findobj(lambda artist: hasattr(artist, "shown_as"))
    points = [(artist.shown_as[0], tip) for artist in tagged for tip in dict.fromkeys(artist.shown_as[1])]
    return pd.DataFrame(points, columns=["source", "what"])
