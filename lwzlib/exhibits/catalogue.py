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

from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import read_yaml
from lwzlib.exhibits import figures, length_figure, paper_figures
from lwzlib.exhibits.paper_figures import NOT_RUN
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


class Exhibit(NamedTuple):
    """A figure, whose `make` is (tables, ax) -> ax, or a table, whose `make` is tables -> DataFrame and whose height follows
    from its rows. `note` says what a reader must know."""

    name: str
    make: Callable
    title: str
    note: str
    height_in: float = 0

    @property
    def is_table(self) -> bool:
        """Whether it is a table, whose rows are written as CSV too."""
        return self.name.startswith("table")


def table_1(tables: Tables) -> pd.DataFrame:
    """WritingBench and Arena-Write, with the ablations of thinking and continual pretraining."""
    published = tables.numbers("Table 1", *_SCORES)
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
    method = tables.numbers("Method").set_index("metric").value
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


_TEXTS = read_yaml(TEXTS / "exhibits.yaml")


def _exhibit(make: Callable) -> Exhibit:
    text = _TEXTS["exhibits"][make.__name__]
    return Exhibit(make.__name__, make, **text | {"note": text["note"].format(arena=_TEXTS["arena"])})


EXHIBITS = {make.__name__: _exhibit(make) for make in (
    paper_figures.figure_1, paper_figures.figure_2, paper_figures.figure_3, paper_figures.figure_4, paper_figures.figure_5,
    paper_figures.figure_6, length_figure.length_control, table_1, table_2, table_4)}


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
