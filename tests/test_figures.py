"""Figures are pure functions of committed rows: same bytes, gaps for what is missing, provenance on every row."""

from pathlib import Path

import pandas as pd
import pytest

from lwzlib import figures
from lwzlib.runs import RunError

RESULTS = Path(__file__).resolve().parent.parent / "figures" / "results"


def test_every_figure_is_drawn_with_the_same_bytes_twice(tmp_path):
    first, second = (figures.draw_all(RESULTS, tmp_path / name) for name in ("a", "b"))
    assert len(first) == 3 * len(list(RESULTS.glob("*.csv")))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_every_committed_row_says_what_made_it():
    for path in RESULTS.glob("*.csv"):
        table = pd.read_csv(path)
        for column in ("model", "arm", "seed", "fingerprint", "commit", "hardware", "versions", "step"):
            assert table[column].notna().all(), f"{path.name}: {column}"
        assert table.commit.str.fullmatch("[0-9a-f]{40}").all()
        assert not table.duplicated(["arm", "seed", "step"]).any()


def test_the_readme_states_the_quarters_of_the_committed_rows():
    stated = (RESULTS.parent.parent / "README.md").read_text()
    for (arm, quantity), rows in figures.quarters(pd.read_csv(RESULTS / "nano.csv")).groupby(["arm", "quantity"]):
        first, last = (", ".join(f"{v:.2f}" for v in rows.sort_values("seed")[c]) for c in ("first quarter", "last quarter"))
        assert f"| {arm} | {quantity} | {first} | {last} |" in stated


def test_a_quantity_that_was_not_measured_is_a_gap_that_says_so():
    table = pd.DataFrame({"arm": "a", "seed": 0, "step": [1, 2], "length": [0.1, 0.2]})
    assert "not run here" in figures.svg(figures.panel(table, ("length", "writing")))


def test_no_results_is_a_clear_error(tmp_path):
    with pytest.raises(RunError, match="no results in"):
        figures.draw_all(tmp_path, tmp_path / "out")
