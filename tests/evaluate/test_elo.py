"""Elo: against an independent logistic regression, against known ratings, and what is said where no rating exists."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from lwzlib.evaluate import elo, intervals
from lwzlib.evaluate.elo import ArenaError

NAMES = list("abcdef")
TRUE = np.array([1000, 1180, 940, 700, 1310, 1040], float)


def table(rows):
    """Judgments from (query, first, second, winner)."""
    return pd.DataFrame([dict(zip(["query_id", "first", "second", "winner"], row, strict=True)) | {"judge": "j", "reason": ""}
                         for row in rows])


def simulated(rng, queries, true=TRUE, ties=0.3, orders=2):
    """Points (queries, M, M); both orders of a pair give the same result, so judgments of a query are not independent."""
    players = len(true)
    points = np.zeros((queries, players, players))
    for i in range(players):
        for j in range(i):
            expected = 1 / (1 + 10 ** ((true[j] - true[i]) / 400))
            tie = ties * min(expected, 1 - expected)  # half of it from each side, so that the expected points stay
            drawn = rng.random(queries)
            taken = np.select([drawn < expected - tie / 2, drawn < expected + tie / 2], [1, 0.5], 0)
            points[:, i, j], points[:, j, i] = orders * taken, orders * (1 - taken)
    return points


def regressed(judgments, anchor):
    """Elo by scikit-learn: a column a player, a row a win, two rows of half a weight a tie."""
    names = sorted({*judgments["first"], *judgments["second"]})
    rows, won, weights = [], [], []
    for first, second, winner in judgments[["first", "second", "winner"]].itertuples(index=False):
        row = np.array([(name == first) * 1.0 - (name == second) for name in names if name != anchor])
        taken = {"first": 1, "tie": 0.5, "second": 0}[winner]
        for side, weight in ((1, taken), (0, 1 - taken)):
            if weight:
                rows, won, weights = [*rows, row], [*won, side], [*weights, weight]
    model = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=500)
    model.fit(np.array(rows), won, weights)
    found = dict(zip([name for name in names if name != anchor], 1000 + 400 / np.log(10) * model.coef_[0], strict=True))
    return found | {anchor: 1000.0}


@pytest.mark.parametrize("seed", range(5))
def test_elo_is_that_of_an_independent_logistic_regression(seed):
    rng = np.random.default_rng(seed)
    names = NAMES[: rng.integers(3, 7)]
    rows = [(str(q), *rng.choice(names, 2, replace=False), rng.choice(["first", "second", "tie"], p=[0.5, 0.35, 0.15]))
            for q in range(25) for _ in range(8)]
    judgments = table(rows)
    found = elo.ratings(judgments, "b", resamples=20).table.set_index("model").elo
    expected = regressed(judgments, "b")
    assert set(found.index) == set(expected) and found["b"] == 1000
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6)


def test_known_ratings_are_recovered_and_the_anchor_only_shifts():
    points = simulated(np.random.default_rng(0), 20_000)
    found = elo.fit_ratings(points.sum(0), 0)
    assert found == pytest.approx(TRUE, abs=12)
    again = elo.fit_ratings(points.sum(0), 3)
    assert again[3] == 1000 and again - again[0] + 1000 == pytest.approx(found, abs=1e-6)
    named = elo.rate_points(NAMES, points[:200], "d", resamples=50).table.set_index("model")
    assert named.loc["d", ["elo", "low", "high"]].tolist() == [1000] * 3


def test_intervals_cover_at_the_stated_rate():
    """200 arenas of 60 queries. Ratings of one arena hang together, so the error of the rate found is at most that of 200
    independent trials, 0.0154; three of them, and 0.01 for the percentiles of 100 resamples, are allowed around 0.95."""
    rng, inside = np.random.default_rng(1), []
    for seed in range(200):
        points = simulated(rng, 60)
        drawn = elo.bootstrap_points(points, lambda some: elo.fit_ratings(some, 0), 100, seed)
        low, high = intervals.percentile_ends(drawn)
        inside.append(((low <= TRUE) & (high >= TRUE))[1:])
    assert np.mean(inside) == pytest.approx(0.95, abs=3 * 0.0154 + 0.01)


def test_resampling_judgments_instead_of_queries_would_be_too_sure():
    """Both orders agree here, so that there are half as many independent results as judgments."""
    points = simulated(np.random.default_rng(2), 100)
    halves = np.concatenate([points / 2, points / 2])  # each order a unit of its own
    drawn = [elo.bootstrap_points(sampled, lambda counted: elo.fit_ratings(counted, 0), 400, 0) for sampled in (points, halves)]
    widths = [np.ptp(intervals.percentile_ends(ratings), axis=0)[1:].mean() for ratings in drawn]
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(0.5), abs=0.08)


def test_tie_is_half_a_win_for_each():
    ties = table([("1", "a", "b", "tie"), ("2", "b", "a", "tie")])
    assert elo.ratings(ties, "a", resamples=10).table.elo.tolist() == [1000, 1000]
    mixed = table([("1", "a", "b", "first"), ("1", "a", "b", "tie"), ("2", "b", "a", "first"), ("2", "a", "b", "first")])
    found = elo.ratings(mixed, "b", resamples=10).table.set_index("model").elo
    assert found["a"] == pytest.approx(1000 + 400 * np.log10(2.5 / 1.5), abs=1e-6)


judged = st.lists(st.tuples(st.sampled_from("12345"), st.sampled_from(["ab", "ba", "bc", "cb", "ac", "ca"]),
                            st.sampled_from(["first", "second", "tie", None])), min_size=1, max_size=40)


@given(judged, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_of_rows_does_not_matter_and_every_rating_is_a_number_or_explained(rows, random):
    rows = [("0", "a", "b", "tie"), ("00", "b", "c", "tie"), *((q, *pair, winner) for q, pair, winner in rows)]
    found = elo.ratings(table(rows), "a", resamples=40)
    random.shuffle(rows)
    again = elo.ratings(table(rows), "a", resamples=40)
    pd.testing.assert_frame_equal(found.table, again.table)
    assert found.statements == again.statements
    for row in found.table.itertuples():
        assert np.isfinite(row.elo) and row.low <= row.high
        assert bool(row.not_finite) == bool(row.note)


def test_separation_is_stated_and_never_a_number():
    rows = [(str(q), first, second, winner) for q in range(4) for first, second, winner in (
        ("best", "mid", "first"), ("mid", "best", "second"), ("mid", "peer", "first"), ("peer", "mid", "tie"),
        ("peer", "mid", "first"), ("peer", "worst", "first"), ("far", "away", "first"), ("away", "far", "first"))]
    found = elo.ratings(table(rows), "mid", resamples=30)
    rated = found.table.set_index("model")
    assert rated.elo["best"] == np.inf and np.isnan(rated.low["best"]) and rated.high["best"] == np.inf
    assert rated.elo["worst"] == -np.inf and rated.low["worst"] == -np.inf and np.isnan(rated.high["worst"])
    assert rated.elo[["far", "away"]].isna().all() and rated.low.isna()["far"] and rated.high.isna()["far"]
    assert rated.elo["peer"] == pytest.approx(1000) and (rated.not_finite[["best", "worst"]] == 1).all()  # 6 of 12 points each
    said = dict(each.split(": ", 1) for each in found.statements)
    assert said["best"].startswith("+inf: ") and said["worst"].startswith("-inf: ") and said["far"].startswith("no rating: ")
    assert "mid" not in said and "peer" not in said
    points = elo.points_by_query(table(rows), ["away", "best", "mid", "peer", "worst", "far"], list("0123"))
    order = elo.pairwise_order(points.sum(0))
    equal = [0, -1, 0, 0, 1, 0]
    assert order.tolist() == [[0] * 6, [0, 0, 1, 1, 1, 0], equal, equal, [0, -1, -1, -1, 0, 0], [0] * 6]
    with pytest.raises(ArenaError, match="'far' is not among"):
        elo.points_by_query(table(rows), ["away", "best", "mid", "peer", "worst"], list("0123"))


def test_separated_resamples_widen_the_interval_and_are_counted():
    rows = [(str(q), "a", "b", "second" if q == 0 else "first") for q in range(20)]  # the one loss is drawn in 1 - 0.95^20
    found = elo.ratings(table(rows), "b", resamples=2000, seed=3)
    row = found.table.set_index("model").loc["a"]
    assert row.elo == pytest.approx(1000 + 400 * np.log10(19), abs=1e-6)
    assert row.not_finite == pytest.approx(0.95**20, abs=3 * np.sqrt(0.36 * 0.64 / 2000))
    assert row.high == np.inf and np.isfinite(row.low) and "counted as infinite" in row.note and len(found.statements) == 1


def test_one_query_gives_a_rating_and_no_interval():
    found = elo.ratings(table([("1", "a", "b", "tie"), ("1", "b", "a", "first"), ("2", "a", "b", None)]), "a")
    row = found.table.set_index("model").loc["b"]
    assert row.elo == pytest.approx(1000 + 400 * np.log10(3)) and np.isnan(row.low) and np.isnan(row.high)
    assert found.statements == ("1 of 3 judgments are missing and left out", "one query only: no interval")


def test_wrong_input_is_refused_with_its_reason():
    judgments = table([("1", "a", "b", "first"), ("1", "b", "c", None)])
    for anchor, reason in (("z", "no match of the baseline 'z'; there are 'a', 'b', 'c'"), ("a", "without any match: c")):
        with pytest.raises(ArenaError, match=reason):
            elo.ratings(judgments, anchor)
    for points, reason in (([[0, -1], [1, 0]], "not negative"), ([[0, np.nan], [1, 0]], "finite"), ([[1, 1], [1, 0]], "itself"),
                           ([[0, 1, 1], [1, 0, 1]], r"\(players, players\)")):
        with pytest.raises(ArenaError, match=reason):
            elo.fit_ratings(np.array(points), 0)


def test_very_unequal_players_are_rated():
    points = np.array([[0, 1e7, 0], [1, 0, 1e7], [0, 1, 0]])
    assert elo.fit_ratings(points, 1) == pytest.approx([3800, 1000, -1800], abs=1e-4)


def test_win_tie_loss_by_hand():
    rows = [("1", "b", "a", "first"), ("1", "a", "b", "first"), ("2", "b", "a", "second"), ("2", "a", "b", "first"),
            ("3", "a", "b", "tie"), ("3", "b", "a", None), ("3", "c", "b", "first")]
    found = elo.win_tie_loss(table(rows))
    assert found[["model", "other"]].to_numpy().tolist() == [["a", "b"], ["b", "c"]]
    row = found.iloc[0]  # of `a`: lost, won | won, won | tied
    assert (row.wins, row.ties, row.losses, row.missing) == (3, 1, 1, 1) and row.win_rate == pytest.approx(3.5 / 5)
    assert (row.both_orders, row.inconsistent) == (2, 0.5) and row.low <= row.win_rate <= row.high
    seen = elo.win_tie_loss(table(rows), "b").set_index("other")
    assert seen.loc["a", ["wins", "ties", "losses", "missing"]].tolist() == [1, 1, 3, 1]
    assert seen.loc["c", "win_rate"] == 0 and np.isnan(seen.loc["c", "low"]) and np.isnan(seen.loc["c", "inconsistent"])
    silent = elo.win_tie_loss(table([("1", "a", "b", None)])).iloc[0]
    assert silent.missing == 1 and silent[["win_rate", "low", "high", "inconsistent"]].isna().all()
    with pytest.raises(ArenaError, match="no judgment of 'z'"):
        elo.win_tie_loss(table(rows), "z")


def test_ratings_over_checkpoints():
    rng = np.random.default_rng(4)
    names = ["base-think@0", "base-think@100", "base-think@20", "baseline", "cpt@think@5"]
    rows = [(str(q), *rng.choice(names, 2, replace=False), rng.choice(["first", "second", "tie"])) for q in range(30)
            for _ in range(10)]
    found = elo.ratings(table(rows), "baseline", resamples=50)
    frame = elo.over_steps(found)
    assert list(frame.columns) == ["arm", "step", "elo", "low", "high", "note"]
    assert frame[["arm", "step"]].to_numpy().tolist() == [
        ["base-think", 0], ["base-think", 20], ["base-think", 100], ["cpt@think", 5]]
    assert frame.elo.tolist() == [found.table.set_index("model").elo[name] for name in (names[0], names[2], names[1], names[4])]
    assert elo.over_steps(elo.ratings(table([("1", "a", "b", "tie"), ("2", "a", "b", "tie")]), "a", 10)).empty
