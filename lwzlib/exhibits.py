"""Every exhibit of the paper as PDF, SVG and PNG, from committed numbers alone: no network, no GPU, the same bytes each time.

One set for each setting that has rows of the paper's arms; without any rows, one set of what is published.
"""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from lwzlib import figures, paper_figures, paper_tables
from lwzlib.results import Tables

WIDTH_IN = 3.5  # one column
_SVG = "http://www.w3.org/2000/svg"
_UNDATED = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
            "png": {"Software": None}}
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")


class Exhibit(NamedTuple):
    """`make`: (tables, ax) -> ax for a figure, tables -> DataFrame for a table (whose height follows from its rows); `note`:
    what a reader must know."""

    name: str
    title: str
    make: Callable
    height_in: float
    note: str

    @property
    def is_table(self) -> bool:
        """What is named table_...; its rows are written as CSV too."""
        return self.name.startswith("table")


_ARENA = ("Here: the embedded arena. The judge is the Writing RM that the arms were trained on, so it shows what they learnt, "
          "not how well they write; Elo is Bradley-Terry by maximum likelihood; the no-think arm before RL stands at 1000, or "
          "else the first by name.")
_UNKNOWN = "The paper's scores are not in this kit's sources."
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
    Exhibit("table_1", "Table 1 · WritingBench, Arena-Write and ablations", paper_tables.table_1, 0,
            "CPT: continual pretraining; without it: Base-think; without thinking: Base-nothink. D1 Academic & Engineering, "
            "D2 Finance & Business, D3 Politics & Law, D4 Literature & Art, D5 Education, D6 Advertising & Marketing. "
            f"{_ARENA} It cannot be compared with Arena-Write."),
    Exhibit("table_2", "Table 2 · Pretraining mixture", paper_tables.table_2,
            0, "The paper's shares are not in this kit's sources."),
    Exhibit("table_3", "Table 3 · Size of the base model", paper_tables.table_3, 0, f"14B: {_UNKNOWN}"),
    Exhibit("table_4", "Table 4 · SFT on long answers", paper_tables.table_4, 0,
            f"{_UNKNOWN} Here SFT learns from the model's own best answers and human passages, not from LongWriter's data; "
            "intervals: 95% over queries."),
    Exhibit("table_5", "Table 5 · LongBench-Write", paper_tables.table_5, 0, _UNKNOWN),
)}


def settings(tables: Tables) -> list[str]:
    """Those with rows of the paper's arms; [""], for what is published alone, if there are none."""
    return [name for name in tables.settings
            if {*(of := tables.of(name)).rl.arm, *of.held_out.arm} & set(figures.ARMS)] or [""]


def draw(exhibit: Exhibit, tables: Tables) -> Figure:
    """One exhibit of one setting, at the width of a column."""
    figure = Figure(figsize=(WIDTH_IN, exhibit.height_in), layout="constrained")
    ax = figure.subplots()
    if exhibit.is_table:
        table = exhibit.make(tables)
        figure.set_figheight(0.2 * (len(table) + 1) + 0.1)
        paper_tables.draw(table, ax)
    else:
        exhibit.make(tables, ax)
    figure.draw_without_rendering()  # lays it out, once for all formats
    figure.set_layout_engine("none")
    return figure


def write(tables: Tables, folder: Path) -> list[Path]:
    """All exhibits, and the curves of every setting, into `folder`; tables as CSV too. What an earlier call left there and
    this one does not write is removed: no old number stays."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for setting in settings(tables):
        of = tables.of(setting)
        for exhibit in EXHIBITS.values():
            stem = f"{exhibit.name}_{setting}".rstrip("_")
            wanted[stem] = draw(exhibit, of)
            if exhibit.is_table:
                exhibit.make(of).to_csv(folder / f"{stem}.csv", index=False)
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
    """The figure as SVG for a page: classes `published` and `measured`, and a tooltip for each point."""
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
    """What a figure shows, a row a point: for those who cannot see it, or want to copy it."""
    tagged: list = figure.findobj(lambda artist: hasattr(artist, "shown_as"))
    said = [(artist.shown_as[0], tip) for artist in tagged for tip in dict.fromkeys(artist.shown_as[1])]
    return pd.DataFrame(said, columns=["source", "what"])
