"""Every exhibit from committed rows: same bytes, gaps that say so, nothing old, nothing that overlaps or is cut off."""

import itertools
import re

import made_results as made
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from lwzlib.exhibits import catalogue, paper_figures, results
from lwzlib.exhibits.catalogue import draw_exhibit, write_exhibits
from lwzlib.exhibits.results import read_tables

FIGURES = [name for name in catalogue.EXHIBITS if not name.startswith("table")]
NAMES = [*(f"figure_{i}" for i in range(1, 7)), "length_control", "table_1", "table_2", "table_4"]  # not 3 and 5


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return read_tables(made.write(tmp_path_factory.mktemp("results"), rl=made.rl(), held_out=made.held_out())).of("nano")


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    return read_tables(tmp_path_factory.mktemp("empty"))


def shown(figure):
    return [artist.shown_as for artist in figure.findobj(lambda artist: hasattr(artist, "shown_as"))]


def texts(figure):
    """What is written on it; an axis keeps labels outside its limits too, which are not drawn."""
    FigureCanvasAgg(figure).draw()
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        found += ax.texts
        if ax.axison:
            found += [ax.title, ax.xaxis.label, ax.yaxis.label]
            for axis in (ax.xaxis, ax.yaxis):
                low, high = sorted(axis.get_view_interval())
                found += [tick.label1 for tick in axis.get_major_ticks()
                          if low <= tick.get_loc() <= high and tick.label1.get_visible()]
    return [text for text in found if text.get_text().strip()]


def test_there_is_every_exhibit_of_the_paper():
    assert list(catalogue.EXHIBITS) == NAMES


def test_committed_rows_give_the_same_bytes_twice(tmp_path):
    committed = read_tables()
    first = write_exhibits(committed, tmp_path / "a")
    second = write_exhibits(committed, tmp_path / "b")
    assert {path.suffix for path in first} == {".pdf", ".svg", ".png"}
    curves = sum(len(committed.of(setting).rl) > 0 for setting in committed.settings)
    assert len(first) == 3 * (len(NAMES) * len(catalogue.settings(committed)) + curves)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    for path in first:
        if path.suffix == ".png":
            pixels = matplotlib.image.imread(path)
            assert np.ptp(pixels[..., :3]) > 0.9, f"{path.name} is blank"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", ["tables", "nothing"])
def test_no_text_overlaps_or_is_cut_off(name, rows, request):
    figure = draw_exhibit(catalogue.EXHIBITS[name], request.getfixturevalue(rows))
    assert figure.get_figwidth() == 3.5
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(boxes) > 3 or (name, len(boxes)) == ("length_control", 1), "of which nothing is published"
    width, height = figure.bbox.size
    for said, box in boxes:
        assert box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2, f"{said!r} is cut off"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(over) < 1.5, f"{one!r} overlaps {other!r}"


def test_figures_hold_what_was_measured_and_what_was_published(tables):
    counts = {name: (sum(kind == "published" for kind, _ in found), sum(kind == "measured" for kind, _ in found))
              for name in FIGURES for found in [shown(draw_exhibit(catalogue.EXHIBITS[name], tables))]}
    # three panels of three arms, each with points, a band and a line; Elo: band, bars and line; five arms, before and after
    assert counts == {"figure_1": (2, 0), "figure_2": (1, 27), "figure_3": (5, 9), "figure_4": (4, 12), "figure_5": (1, 20),
                      "figure_6": (1, 6), "length_control": (0, 10)}


def test_every_published_number_of_an_exhibit_is_on_it(nothing):
    for name, number in (("figure_3", 5), ("figure_4", 4), ("figure_1", 18)):
        tips = [tip for kind, tips in shown(draw_exhibit(catalogue.EXHIBITS[name], nothing)) for tip in tips]
        assert len(tips) == number and all(re.match(r"published \([AB]\): .*arXiv", tip) for tip in tips), name
    table = catalogue.EXHIBITS["table_1"].make(nothing).set_index("model")
    assert table.loc["LongWriter-Zero", ["avg", "D4", "length", "Elo"]].tolist() == ["8.69", "8.4", "8.6", "1447"]
    assert table.loc["Qwen2.5-Max", "Elo"] == "" and table.loc["DeepSeek-V3", "avg"] == ""


def test_published_and_measured_never_share_a_style(tables):
    for name in FIGURES:
        figure = draw_exhibit(catalogue.EXHIBITS[name], tables)
        for line in figure.findobj(lambda artist: hasattr(artist, "shown_as") and hasattr(artist, "get_markerfacecolor")):
            black = to_hex(line.get_color()) == "#000000"
            if line.shown_as[0] == "published":
                assert black and (line.get_markerfacecolor() == "none" or line.get_marker() == "|"), name
            else:
                assert not black or line.get_markerfacecolor() == "black" or line.get_marker() in ("None", ""), name


def test_every_measured_point_names_arm_seed_and_commit(tables):
    for name in ("figure_2", "figure_3", "figure_4", "figure_6", "length_control"):
        svg = catalogue.interactive(draw_exhibit(catalogue.EXHIBITS[name], tables), name, "title")
        tips = re.findall(r"<title>(.*?)</title>", svg)
        points = [tip for tip in tips if re.search(r"step \d|after SFT|asked for", tip)]
        assert len(points) > 7 and all("seed" in tip and "commit 012345678" in tip for tip in points), name


def test_an_empty_plan_and_a_player_who_never_lost_are_drawn_or_named(tables):
    rl = made.rl().assign(setting="nano", think_tokens=lambda t: t.step % 2 * 40)
    held_out = made.held_out().assign(setting="nano")
    held_out.loc[(held_out.arm == "base-think") & (held_out.phase == "after"), "writing"] = 99.0
    of = results.Tables(tables.published, rl, held_out, tables.mixture)
    svg = {name: catalogue.interactive(draw_exhibit(catalogue.EXHIBITS[name], of), name, "t")
           for name in ("figure_3", "figure_6")}
    assert "1 not finite" in svg["figure_3"] and "base-think, seeds 0, 1, 2, commit 012345678: step 4" in svg["figure_3"]
    assert svg["figure_6"].count("plan, tokens 0<") == svg["figure_6"].count("plan, tokens 40<") == 24
    table = catalogue.EXHIBITS["table_1"].make(of).set_index("model").avg
    assert table["base-think"] == "embedded arena, Elo not finite" and "inf" not in table["base-nothink"]


def test_one_seed_has_no_band_and_three_have_their_range(tables):
    one = results.Tables(tables.published, tables.rl[tables.rl.seed == 0], tables.held_out[tables.held_out.seed == 0],
                         tables.mixture).of("nano")
    for name in ("figure_2", "figure_3"):
        bands = [[tip for _, tips in shown(draw_exhibit(catalogue.EXHIBITS[name], of)) for tip in tips if "range of" in tip]
                 for of in (one, tables)]
        assert not bands[0] and bands[1], name


def test_a_deleted_results_file_leaves_gaps_and_no_old_number(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "_UNDATED", {"svg": {"Date": None}})
    folder, out = made.write(tmp_path / "rows", rl=made.rl(), held_out=made.held_out()), tmp_path / "out"
    write_exhibits(read_tables(folder), out)
    assert "Elo 1" in (out / "table_1_nano.csv").read_text()
    (out / "my_thesis.pdf").write_text("not the kit's")
    (folder / "nano_held_out.csv").unlink()
    write_exhibits(read_tables(folder), out)
    assert "Elo 1" not in (out / "table_1_nano.csv").read_text()
    for name in ("figure_3", "figure_4", "figure_5"):
        assert "not run here" in (out / f"{name}_nano.svg").read_text(), name
    (folder / "nano.csv").unlink()
    write_exhibits(read_tables(folder), out)
    assert not list(out.glob("*nano*")), "nothing of the deleted rows is left"
    assert (out / "my_thesis.pdf").exists(), "only what an earlier call wrote is removed"
    for name in NAMES:
        assert "not run here" in (out / f"{name}.svg").read_text(), name


def test_missing_arms_seeds_and_columns_are_gaps(tables):
    for held_out in (made.held_out((0,), {"base-think": made.ARMS["base-think"]}), made.held_out().drop(columns="writing"),
                     made.held_out().query("phase == 'before'")):
        of = results.Tables(tables.published, made.rl((0,)).drop(columns="think_tokens").assign(setting="nano"),
                            held_out.assign(setting="nano"), tables.mixture)
        for exhibit in catalogue.EXHIBITS.values():
            assert draw_exhibit(exhibit, of).axes


def test_five_styles_stay_apart_in_grey(tables):
    def grey(colour):
        red, green, blue = (int(to_hex(colour)[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue
    looks = [(grey(colour), dash, marker) for colour, dash, marker in paper_figures.ARMS.values()]
    for (a, *one), (b, *other) in itertools.combinations(looks, 2):
        assert one[-1] != other[-1] and (abs(a - b) > 5 or one != other)
