"""How far judgments can be trusted: agreement of two judges, liking for a place and for length; and whether the Writing RM,
which pays in training, ranks checkpoints as the arena does.

The paper reports none of this. Every interval is 95%; all but the last treat queries as what was sampled, as in `elo`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lwzlib.evaluate import elo
from lwzlib.evaluate.elo import ArenaError, mean_over_queries, points_by_query, points_of
from lwzlib.evaluate.intervals import percentile_ends, resample_counts

_SHOWN = ["query_id", "first", "second"]  # what makes two judgments answers to the same question
_ANSWERS = ("first", "second", "tie")


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95% interval. What cannot be said is NaN, and `note` says why."""

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0  # things compared
    note: str = ""


def _bootstrapped(value: float, drawn: np.ndarray, n: int, queries: int, undefined: str) -> Estimate:
    """Estimate from the values `drawn` by resampling; `undefined` is the note of a value that is NaN."""
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value):
        return Estimate(n=n, note=undefined)
    if queries < 2 or not len(drawn):
        return Estimate(value, n=n, note="one query only: no interval")
    low, high = percentile_ends(drawn)
    return Estimate(value, float(low), float(high), n)


def kappa(one: pd.DataFrame, other: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Cohen's kappa (1960) of two judges over what both judged in the same order, in the classes first, second, tie.

    NaN where chance alone would make them agree fully (each always gives the same answer); such resamples are left out of
    the interval. Raises ArenaError if they share no judgment.
    """
    both = one.dropna(subset="winner").merge(other.dropna(subset="winner"), on=_SHOWN, suffixes=("_one", "_other"))
    if both.empty:
        raise ArenaError("the two judges share no judgment: the same query, with the same texts in the same order")
    if both.duplicated(_SHOWN).any():
        raise ArenaError("a judgment is there twice; give the judgments of one judge on each side")
    query, queries = pd.factorize(both.query_id, sort=True)
    counts = np.zeros((len(queries), 3, 3))  # [q, i, j]: how often one judge gave answer i and the other answer j
    np.add.at(counts, (query, both.winner_one.map(_ANSWERS.index), both.winner_other.map(_ANSWERS.index)), 1)
    drawn = _kappa(np.tensordot(resample_counts(len(queries), resamples, seed), counts, 1))
    return _bootstrapped(float(_kappa(counts.sum(0))), drawn, len(both), len(queries),
                         "each judge gives one answer only: kappa is not defined")


def _kappa(counts: np.ndarray) -> np.ndarray:
    """Kappa (...) from (..., 3, 3) counts of answers."""
    shares = counts / counts.sum((-2, -1), keepdims=True)
    observed, expected = np.trace(shares, axis1=-2, axis2=-1), (shares.sum(-1) * shares.sum(-2)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 1 - 1e-12, np.nan, (observed - expected) / (1 - expected))


def kendall(one: pd.DataFrame, other: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Kendall's tau-b between the Elo rankings of two judges, over the models that both judged; the same queries are drawn
    for both. Two models that nothing compares count as tied."""
    common = sorted({*one["first"], *one["second"]} & {*other["first"], *other["second"]})
    if len(common) < 2:
        raise ArenaError("the two judges share fewer than two models")
    sides = [judged[judged["first"].isin(common) & judged["second"].isin(common)] for judged in (one, other)]
    queries = sorted({*sides[0].query_id, *sides[1].query_id})
    points = [points_by_query(judged, common, queries) for judged in sides]
    value = float(_tau(*(elo.pairwise_order(taken.sum(0)) for taken in points)))
    drawn = _tau(*(elo.bootstrap_points(taken, elo.pairwise_order, resamples, seed) for taken in points))
    return _bootstrapped(value, drawn, len(common), len(queries), "one of the judges ranks no model above another")


def _tau(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Tau-b (...) of orders (..., M, M)."""
    with np.errstate(invalid="ignore"):
        return (one * other).sum((-2, -1)) / np.sqrt((one**2).sum((-2, -1)) * (other**2).sum((-2, -1)))


def position_bias(judgments: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Share of the points that go to the text shown first: 0.5 without bias, 1 if it always wins. Only pairs that the same
    judge saw in both orders count, so that the better text stands first as often as second. Filter first for one judge."""
    known = judgments.assign(points=points_of(judgments), one=np.minimum(judgments["first"], judgments["second"]),
                             other=np.maximum(judgments["first"], judgments["second"])).dropna(subset="points")
    known = known[known.groupby(["judge", "query_id", "one", "other"])["first"].transform("nunique") == 2]
    value, low, high = mean_over_queries(known.query_id, known.points, resamples, seed)
    return Estimate(value, low, high, len(known), "" if len(known) else "no pair was judged in both orders")


def length_bias(judgments: pd.DataFrame, words: Mapping[tuple[str, str], int], strengths: bool = True) -> Estimate:
    """Slope of a logistic regression: log odds that a text wins for each unit of log(its words / the other's); a tie is half
    a win, exp(slope * log 2) is the odds ratio of being twice as long, 0 is no bias.

    `words` {(model, query id): words}; one word is added to each, so that an empty text has a logarithm. With `strengths`
    each model has a Bradley-Terry strength beside, and the slope says what length does at equal strength; without, a
    model that writes longer and better counts for length. There is an intercept for the first place. The interval is
    Wald's with a variance clustered by query (Liang and Zeger 1986). NaN if the judgments are perfectly separated.
    """
    known = judgments.dropna(subset="winner")
    n, points = len(known), points_of(known)
    texts = {text for side in ("first", "second") for text in zip(known[side], known.query_id, strict=True)}
    if unknown := texts - words.keys():
        raise ArenaError(f"no words are given for {min(unknown)}")
    ratio = [np.log1p(words[a, q]) - np.log1p(words[b, q]) for q, a, b in known[_SHOWN].itertuples(index=False)]
    columns: list = [ratio, np.ones(n)]
    if strengths:
        columns += [known["first"].eq(name) * 1.0 - known["second"].eq(name) for name in elo.players(known)[0][1:]]
    design = np.column_stack(columns).astype(float)
    if not n or np.linalg.matrix_rank(design) < design.shape[1]:
        return Estimate(n=n, note="length, strength and place cannot be told apart here")
    if _separated(design, points):
        return Estimate(n=n, note="perfectly separated: the longer text or some model always won")
    slope, error = _logistic(design, points, pd.factorize(known.query_id, sort=True)[0])
    return Estimate(slope, slope - 1.96 * error, slope + 1.96 * error, n)


def _separated(design: np.ndarray, points: np.ndarray) -> bool:
    """Whether some direction fits every judgment at least as well for ever (Konis 2007): then there is no finite maximum."""
    from scipy.optimize import linprog

    tied = points == 0.5
    gains = design[~tied] * np.sign(points[~tied] - 0.5)[:, None]  # of a step in the direction, for what was decided
    equal = {"A_eq": design[tied], "b_eq": np.zeros(tied.sum())} if tied.any() else {}
    best = linprog(-gains.sum(0), A_ub=-gains, b_ub=np.zeros(len(gains)), bounds=(-1, 1), **equal)
    return best.status == 0 and -best.fun > 1e-7


def _logistic(design: np.ndarray, points: np.ndarray, queries: np.ndarray) -> tuple[float, float]:
    """(coefficient of the first column, its standard error clustered by query)."""
    from sklearn.linear_model import LogisticRegression

    rows, weights = np.vstack([design, design]), np.concatenate([points, 1 - points])  # so much won, so much lost
    won = np.repeat([1, 0], len(points))
    model = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-10, max_iter=200)
    slopes = model.fit(rows[weights > 0], won[weights > 0], weights[weights > 0]).coef_[0]
    clusters = queries.max() + 1
    if clusters < 2:
        return float(slopes[0]), np.nan
    expected = 1 / (1 + np.exp(-design @ slopes))
    bread = np.linalg.inv(design.T @ (design * (expected * (1 - expected))[:, None]))  # inverse information
    scores = np.zeros((clusters, design.shape[1]))
    np.add.at(scores, queries, design * (points - expected)[:, None])
    variance = bread @ (scores.T @ scores) @ bread * clusters / (clusters - 1)
    return float(slopes[0]), float(np.sqrt(variance[0, 0]))


def rm_against_elo(rated: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of mean Writing RM score and Elo over checkpoints: a row per arm, and `all` of them pooled:
    arm, spearman, low, high, checkpoints, note.

    `rated`: arm, step, elo, as `elo.over_steps` gives it; `scores`: arm, step, score. The interval is Bonett and Wright's
    (2000): Fisher's z with standard error sqrt((1 + r^2 / 2) / (n - 3)); it takes checkpoints as independent, which
    neighbours in a run are not, so it is rather too narrow. Below four checkpoints there is none.
    """
    both = rated[["arm", "step", "elo"]].merge(scores[["arm", "step", "score"]], on=["arm", "step"], validate="1:1").dropna()
    rows = [{"arm": arm, **vars(_spearman(own.elo, own.score))} for arm, own in (*both.groupby("arm"), ("all", both))]
    return pd.DataFrame(rows).rename(columns={"value": "spearman", "n": "checkpoints"})


def _spearman(one: pd.Series, other: pd.Series) -> Estimate:
    n = len(one)
    r = one.rank().corr(other.rank()) if n > 1 else np.nan
    if np.isnan(r):
        return Estimate(n=n, note="fewer than two checkpoints, or one of the two never changes")
    if n < 4:
        return Estimate(r, n=n, note="no interval: fewer than four checkpoints")
    if abs(r) > 1 - 1e-12:
        return Estimate(r, n=n, note="no interval: the ranks agree or disagree fully")
    z, error = np.arctanh(r), 1.96 * np.sqrt((1 + r**2 / 2) / (n - 3))
    return Estimate(r, np.tanh(z - error), np.tanh(z + error), n)
