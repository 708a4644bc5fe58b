"""Length control: rank correlations, their intervals, and what a ledger makes of them."""

import made_results as made
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lwzlib.evaluate.length_control import length_table, with_length_control
from lwzlib.evaluate.longbench import length_score
from lwzlib.exhibits import claims
from lwzlib.exhibits.results import read_tables


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=20))
def test_the_mean_over_queries_is_spearmans_correlation(pairs):
    asked, written = zip(*pairs, strict=True)
    table = with_length_control(pd.DataFrame({"arm": "a", "seed": 0, "phase": "after", "step": None, "asked_words": asked,
                                              "answer_words": written}))
    if min(len(set(asked)), len(set(written))) == 1:
        assert table.length_control.isna().all(), "all alike: there is no correlation"
    else:
        assert table.length_control.mean() == pytest.approx(stats.spearmanr(asked, written).statistic)
    assert table.S_l.tolist() == [length_score(*pair) for pair in pairs]


def test_each_arm_seed_and_phase_is_ranked_by_itself_and_has_its_interval():
    held_out = made.held_out()
    numbers = length_table(held_out).set_index(["arm", "phase"])
    assert set(numbers.index.get_level_values("phase")) == {"before", "after"}
    of = held_out[(held_out.arm == "base-think") & (held_out.phase == "after")]
    seeds = [stats.spearmanr(rows.asked_words, rows.answer_words).statistic for _, rows in of.groupby("seed")]
    after = numbers.loc["base-think", "after"]
    assert after.correlation == pytest.approx(np.mean(seeds)) and (after.seeds, after.queries) == (3, made.QUERIES)
    half = stats.t.ppf(0.975, 2) * stats.sem(seeds)
    assert (after.low, after.high) == pytest.approx((np.mean(seeds) - half, np.mean(seeds) + half))
    assert (numbers.xs("after", level=1).correlation > numbers.xs("before", level=1).correlation).all()


def test_the_interval_of_one_seed_covers_the_correlation_as_often_as_it_says():
    """Drawn anew from a normal pair of known rank correlation, 0.95 of the intervals hold it."""
    rng, r = np.random.default_rng(0), 0.7
    truth, hits = 6 / np.pi * np.arcsin(r / 2), 0
    for _ in range(400):
        x = rng.standard_normal(48)
        y = r * x + np.sqrt(1 - r**2) * rng.standard_normal(48)
        row = length_table(pd.DataFrame({"arm": "a", "seed": 0, "phase": "after", "step": None, "id": range(48),
                                         "asked_words": 200 + x, "answer_words": 200 + y})).iloc[0]
        hits += row.low < truth < row.high
    assert 0.91 < hits / 400 < 0.985


def test_rows_without_what_was_asked_have_no_length_control():
    old = made.held_out().drop(columns="asked_words")
    assert length_table(old).empty and "length_control" not in with_length_control(old)
    assert length_table(made.held_out().iloc[:0]).empty and list(length_table(old)) == list(length_table(made.held_out()))
    mixed = pd.concat([old.assign(setting="old"), made.held_out().assign(setting="new")], ignore_index=True)
    found = with_length_control(mixed)
    assert found.length_control.notna().equals(found.setting == "new")


def test_the_ledger_tests_it_like_a_reward(tmp_path):
    tables = read_tables(made.write(tmp_path, held_out=made.held_out())).of("nano")
    rises = claims.Test(name="length control", column="length_control", region=(0, None), worth=0.05,
                        contrast={"base-think after": 1, "base-think before": -1})
    finding = claims.examine_test(rises, tables)
    numbers = length_table(made.held_out()).set_index(["arm", "phase"]).correlation["base-think"]
    assert finding.effect == pytest.approx(numbers["after"] - numbers["before"], abs=1e-3) and finding.verdict == "supported"
