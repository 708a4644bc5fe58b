"""Agreement and bias of judges: against scikit-learn and scipy, and on judges whose bias is known."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import cohen_kappa_score

from lwzlib.evaluate import elo, trust
from lwzlib.evaluate.elo import ArenaError

ANSWERS = ["first", "second", "tie"]


def table(rows, judge="j"):
    """Judgments from (query, first, second, winner) or (query, first, second, winner, judge)."""
    columns = ["query_id", "first", "second", "winner", "judge"]
    return pd.DataFrame([dict(zip(columns, (*row, judge)[:5], strict=True)) for row in rows], columns=columns).assign(reason="")


def arena(rng, models, queries, chance, judge="j"):
    """Both orders of all pairs; `chance(query, first, second)` that the first wins."""
    pairs = itertools.product(map(str, range(queries)), itertools.permutations(models, 2))
    return table([(q, a, b, "first" if rng.random() < chance(q, a, b) else "second") for q, (a, b) in pairs], judge)


@given(st.lists(st.tuples(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS)), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_kappa_is_scikit_learns(answers):
    one, other = (table([(str(i // 2), "ab"[i % 2], "ba"[i % 2], pair[side]) for i, pair in enumerate(answers)])
                  for side in (0, 1))
    found = trust.kappa(one, other.sample(frac=1, random_state=0), resamples=20)
    if len({answer for pair in answers for answer in pair}) == 1:
        assert np.isnan(found.value) and np.isnan(found.low) and "not defined" in found.note
    else:
        assert found.value == pytest.approx(cohen_kappa_score(*zip(*answers, strict=True)), abs=1e-12)
        assert found.n == len(answers) and (np.isnan(found.low) or -1 <= found.low <= found.high <= 1)
    if len(answers) <= 2:
        assert np.isnan(found.low) and found.note


def test_kappa_of_judges_who_agree_in_half_of_the_cases_and_guess_else():
    rng = np.random.default_rng(0)
    truth = rng.choice(ANSWERS, 4000)
    other = np.where(rng.random(4000) < 0.5, truth, rng.choice(ANSWERS, 4000))
    one, two = (table([(str(i // 8), f"m{i % 8}", "x", answer) for i, answer in enumerate(each)]) for each in (truth, other))
    two.loc[:3, "winner"] = None
    found = trust.kappa(one, two)
    assert found.low < 0.5 < found.high and found.high - found.low < 0.1 and found.n == 3996
    with pytest.raises(ArenaError, match="share no judgment"):
        trust.kappa(one, two.assign(query_id="elsewhere"))
    with pytest.raises(ArenaError, match="twice"):
        trust.kappa(pd.concat([one, one]), two)


def test_kendall_is_scipys_on_the_ratings():
    rng, models = np.random.default_rng(1), list("abcdef")
    strength = dict(zip(models, [0, 0.4, 0.8, 1.2, 1.6, 2.0], strict=True))

    def clear(q, a, b):
        return 1 / (1 + np.exp(strength[b] - strength[a]))

    one, other = arena(rng, models, 30, clear), arena(rng, models, 30, lambda *_: 0.5)
    found = trust.kendall(one, other)
    ratings = [elo.ratings(each, "a", resamples=2).table.set_index("model").elo[models] for each in (one, other)]
    assert found.value == pytest.approx(kendalltau(*ratings).statistic, abs=1e-12) and found.low <= found.value <= found.high
    same = trust.kendall(one, one.sample(frac=1, random_state=0))
    assert (same.value, same.low, same.high, same.n) == (1, 1, 1, 6)
    alike = trust.kendall(one, arena(rng, models, 30, clear))
    assert alike.value > 0.6 and alike.low > 0 > found.low, "a judge at random does not agree, one with the same taste does"
    with pytest.raises(ArenaError, match="fewer than two models"):
        trust.kendall(one, table([("1", "x", "y", "tie")]))


def test_kendall_ranks_those_who_never_lose_and_says_where_nothing_is_ranked():
    never = table([(str(q), *pair, "first" if pair[0] < pair[1] else "second") for q in range(5)
                   for pair in itertools.permutations("abc", 2)])
    turned = never.assign(winner=never.winner.map({"first": "second", "second": "first"}))
    assert trust.kendall(never, never).value == 1 and trust.kendall(never, turned).high == -1
    equal = trust.kendall(never, never.assign(winner="tie"))
    assert np.isnan(equal.value) and "ranks no model" in equal.note


def test_position_bias_counts_pairs_seen_in_both_orders_only():
    rng = np.random.default_rng(3)
    first = trust.position_bias(arena(rng, "abc", 60, lambda *_: 0.7))
    assert first.low < 0.7 < first.high and first.n == 360
    strong = trust.position_bias(arena(rng, "abc", 60, lambda q, a, b: 0.95 if a < b else 0.05))
    assert strong.low < 0.5 < strong.high, "a better model is no bias"
    rows = [("1", "a", "b", "first"), ("1", "b", "a", "tie"), ("2", "a", "b", "first"), ("3", "a", "b", "first", "k"),
            ("3", "b", "a", "first"), ("4", "a", "b", "second"), ("4", "b", "a", None)]
    hand = trust.position_bias(table(rows))
    assert (hand.value, hand.n) == (0.75, 2) and np.isnan(hand.low)
    none = trust.position_bias(table(rows[2:]))
    assert np.isnan(none.value) and none.note == "no pair was judged in both orders"


def length_case(rng, queries, slope, models=("a", "b", "c")):
    """`b` is the stronger by 1 logit and writes twice as much; the first place is worth 0.3."""
    words = {(model, str(q)): int(rng.lognormal(6 + 0.7 * (model == "b"), 0.5)) for model in models for q in range(queries)}

    def chance(q, a, b):
        log_ratio = np.log1p(words[a, q]) - np.log1p(words[b, q])
        return 1 / (1 + np.exp(-0.3 - slope * log_ratio - (a == "b") + (b == "b")))

    return arena(rng, models, queries, chance), words


def test_length_bias_is_told_from_strength_and_solves_the_likelihood():
    judged, words = length_case(np.random.default_rng(4), 400, 0.8)
    judged.loc[::9, "winner"] = "tie"
    found, confounded = trust.length_bias(judged, words), trust.length_bias(judged, words, strengths=False)
    assert confounded.value > found.high, "without strengths the better model's length counts"
    ratio = np.array([np.log1p(words[a, q]) - np.log1p(words[b, q])
                      for q, a, b in judged[["query_id", "first", "second"]].to_numpy()])
    sides = [judged["first"].eq(name) * 1.0 - judged["second"].eq(name) for name in "bc"]
    design, points = np.column_stack([ratio, np.ones(len(ratio)), *sides]), elo.points_of(judged)
    fitted = minimize(lambda x: (np.logaddexp(0, design @ x) - points * (design @ x)).sum(), np.zeros(4), method="BFGS",
                      jac=lambda x: design.T @ (1 / (1 + np.exp(-design @ x)) - points), options={"gtol": 1e-7})
    assert found.value == pytest.approx(fitted.x[0], abs=1e-6)


def test_interval_of_the_length_bias_covers_at_the_stated_rate():
    """100 arenas: three binomial standard errors are 0.065."""
    rng, inside = np.random.default_rng(5), []
    for _ in range(100):
        found = trust.length_bias(*length_case(rng, 50, 0.8))
        inside.append(found.low <= 0.8 <= found.high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.065)


def test_length_bias_says_when_it_cannot_be_told():
    words = {("a", "1"): 10, ("b", "1"): 20, ("a", "2"): 30, ("b", "2"): 10}
    rows = [(q, *pair) for q in "12" for pair in ("ab", "ba")]
    longer = table([(q, a, b, "first" if words[a, q] > words[b, q] else "second") for q, a, b in rows])
    found = trust.length_bias(longer, words)
    assert np.isnan(found.value) and "perfectly separated" in found.note
    collinear = trust.length_bias(longer, {(model, q): 10 * (model == "a") for model in "ab" for q in "12"})
    assert np.isnan(collinear.value) and "cannot be told apart" in collinear.note
    assert trust.length_bias(longer.assign(winner="tie"), words).value == pytest.approx(0, abs=1e-9)
    assert trust.length_bias(longer.assign(winner=None), words).n == 0
    with pytest.raises(ArenaError, match=r"no words are given for \('b', '2'\)"):
        trust.length_bias(longer, {place: n for place, n in words.items() if place != ("b", "2")})


def test_writing_rm_against_elo_over_checkpoints():
    rng = np.random.default_rng(6)
    rated = pd.DataFrame({"arm": ["think"] * 9 + ["nothink"] * 3, "step": [*range(9), *range(3)],
                          "elo": rng.normal(1000, 90, 12)})
    scores = rated[["arm", "step"]].assign(score=rated.elo * 0.01 + rng.normal(0, 1, 12)).sample(frac=1, random_state=0)
    rated.loc[0, "elo"] = -np.inf
    found = trust.rm_against_elo(rated, scores).set_index("arm")
    both = rated.merge(scores, on=["arm", "step"])
    for arm, rows in (("all", both), ("think", both[both.arm == "think"]), ("nothink", both[both.arm == "nothink"])):
        assert found.spearman[arm] == pytest.approx(spearmanr(rows.elo, rows.score).statistic)
        assert found.checkpoints[arm] == len(rows)
    r, n = found.spearman["all"], 12
    error = 1.96 * np.sqrt((1 + r**2 / 2) / (n - 3))
    assert np.arctanh([found.low["all"], found.high["all"]]) == pytest.approx([np.arctanh(r) - error, np.arctanh(r) + error])
    assert np.isnan(found.low["nothink"]) and "fewer than four" in found.note["nothink"] and not found.note["all"]
    assert trust.rm_against_elo(rated.assign(elo=np.nan), scores).note.tolist() == [
        "fewer than two checkpoints, or one of the two never changes"]
