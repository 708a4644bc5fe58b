"""How far judgments can be trusted: agreement of two judges, liking for one's own family, for a place, for length; and
whether the Writing RM, which pays in training, ranks checkpoints as the arena does.

The paper reports none of this. Every interval is 95% and treats queries as what was sampled, as in `elo`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lwzlib.evaluate import elo, intervals
from lwzlib.evaluate.elo import ArenaError, over_queries, points_by_query, points_of

_SAME = ["query_id", "first", "second"]
_CLASSES = ("first", "second", "tie")


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95% interval. What cannot be said is NaN, and `note` says why."""

    value: float
    low: float
    high: float
    n: int  # of what was compared
    note: str = ""


def kappa(one: pd.DataFrame, other: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Cohen's kappa (1960) of two judges over what both judged in the same order, in the classes first, second, tie.

    NaN where chance alone would make them agree fully (each always gives the same answer); such resamples are left out of
    the interval. Raises ArenaError if they share no judgment.
    """
    both = _shared(one, other)
    codes, queries = pd.factorize(both.query_id, sort=True)
    counts = np.zeros((len(queries), 3, 3))
    np.add.at(counts, (codes, *(both[side].map(_CLASSES.index) for side in ("winner_one", "winner_other"))), 1)
    value = float(_kappa(counts.sum(0)))
    drawn = _kappa((intervals.resample_counts(len(queries), resamples, seed) @ counts.reshape(-1, 9)).reshape(-1, 3, 3))
    return _estimate(value, drawn, len(both), len(queries), "each judge gives one answer only: kappa is not defined")


def _kappa(counts: np.ndarray) -> np.ndarray:
    """Of (..., 3, 3) counts of answers."""
    shares = counts / counts.sum((-2, -1), keepdims=True)
    observed, expected = np.trace(shares, axis1=-2, axis2=-1), (shares.sum(-1) * shares.sum(-2)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 1 - 1e-12, np.nan, (observed - expected) / (1 - expected))


def _shared(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    both = one.dropna(subset="winner").merge(other.dropna(subset="winner"), on=_SAME, suffixes=("_one", "_other"))
    if both.empty:
        raise ArenaError("the two judges share no judgment: the same query, with the same texts in the same order")
    if both.duplicated(_SAME).any():
        raise ArenaError("a judgment is there twice; give the judgments of one judge on each side")
    return both


def _estimate(value: float, drawn: np.ndarray, n: int, queries: int, undefined: str) -> Estimate:
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or queries < 2 or not len(drawn):
        return Estimate(value, np.nan, np.nan, n, undefined if np.isnan(value) else "one query only: no interval")
    low, high = intervals.percentile_ends(drawn, 0.95)
    return Estimate(value, float(low), float(high), n)


def kendall(one: pd.DataFrame, other: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Kendall's tau-b between the Elo rankings of two judges, over the models that both judged; the same queries are drawn
    for both. Two models that nothing compares count as tied."""
    common = sorted({*one["first"], *one["second"]} & {*other["first"], *other["second"]})
    if len(common) < 2:
        raise ArenaError("the two judges share fewer than two models")
    sides = [table[table["first"].isin(common) & table["second"].isin(common)] for table in (one, other)]
    queries = sorted({*sides[0].query_id, *sides[1].query_id})
    points = [points_by_query(table, common, queries) for table in sides]
    value = float(_tau(*(elo.order(each.sum(0)) for each in points)))
    drawn = _tau(*(elo.bootstrap(each, elo.order, resamples, seed) for each in points))
    return _estimate(value, drawn, len(common), len(queries), "one of the judges ranks no model above another")


def _tau(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """tau-b of orders (..., M, M)."""
    with np.errstate(invalid="ignore"):
        return (one * other).sum((-2, -1)) / np.sqrt((one**2).sum((-2, -1)) * (other**2).sum((-2, -1)))


def self_preference(judgments: pd.DataFrame, families: Mapping[str, str], judges: Mapping[str, str],
                    resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Win rate of a family's models against those of others, under judges of the same family (`own`) minus under other
    judges (`others`), over what both kinds judged in the same order. A row a family: family, own, others, difference, low,
    high, judged (so many pairs shown). `families` of the models, `judges`: of the judges.
    """
    if unknown := ({*judgments["first"], *judgments["second"]} - families.keys()) | (set(judgments.judge) - judges.keys()):
        raise ArenaError(f"no family is given for {', '.join(sorted(unknown))}")
    first, second, judge = judgments["first"].map(families), judgments["second"].map(families), judgments.judge.map(judges)
    out = []
    for family in sorted(set(judge)):
        points = np.where(first == family, points_of(judgments), 1 - points_of(judgments))
        rows = judgments.assign(own=judge == family, points=points)[(first == family) != (second == family)]
        rates = rows.pivot_table(index=_SAME, columns="own", values="points").reindex(columns=[True, False]).dropna()
        if len(rates):
            queries = rates.index.get_level_values("query_id")
            difference, low, high = over_queries(queries, rates[True] - rates[False], resamples, seed)
            out.append({"family": family, "own": rates[True].mean(), "others": rates[False].mean(), "difference": difference,
                        "low": low, "high": high, "judged": len(rates)})
    return pd.DataFrame(out, columns=["family", "own", "others", "difference", "low", "high", "judged"])


def position_bias(judgments: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Share of the points that go to the text shown first: 0.5 without bias, 1 if it always wins. Only pairs that the same
    judge saw in both orders count, so that the better text stands first as often as second. Of one judge, filter first."""
    known = judgments.assign(points=points_of(judgments), one=np.minimum(judgments["first"], judgments["second"]),
                             other=np.maximum(judgments["first"], judgments["second"])).dropna(subset="points")
    known = known[known.groupby(["judge", "query_id", "one", "other"])["first"].transform("nunique") == 2]
    value, low, high = over_queries(known.query_id, known.points, resamples, seed)
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
    texts = {text for side in ("first", "second") for text in zip(known[side], known.query_id, strict=True)}
    if unknown := texts - words.keys():
        raise ArenaError(f"no words are given for {min(unknown)}")
    ratio = [np.log1p(words[a, q]) - np.log1p(words[b, q]) for q, a, b in known[_SAME].itertuples(index=False)]
    columns: list = [ratio, np.ones(len(known))]
    if strengths:
        columns += [known["first"].eq(name) * 1.0 - known["second"].eq(name) for name in elo.players(known)[0][1:]]
    design, queries = np.column_stack(columns).astype(float), pd.factorize(known.query_id, sort=True)[0]
    if not len(known) or np.linalg.matrix_rank(design) < design.shape[1]:
        return Estimate(np.nan, np.nan, np.nan, len(known), "length, strength and place cannot be told apart here")
    if _separated(design, points_of(known)):
        return Estimate(np.nan, np.nan, np.nan, len(known), "perfectly separated: the longer text or some model always won")
    slope, error = _logistic(design, points_of(known), queries)
    return Estimate(slope, slope - 1.96 * error, slope + 1.96 * error, len(known))


def _separated(design: np.ndarray, points: np.ndarray) -> bool:
    """Whether some direction fits every judgment at least as well for ever (Konis 2007): then there is no finite maximum."""
    from scipy.optimize import linprog

    decided, half = points != 0.5, points == 0.5
    signed = design[decided] * np.where(points[decided] > 0.5, 1, -1)[:, None]
    equal = {"A_eq": design[half], "b_eq": np.zeros(half.sum())} if half.any() else {}
    found = linprog(-signed.sum(0), A_ub=-signed, b_ub=np.zeros(len(signed)), bounds=(-1, 1), **equal)
    return found.status == 0 and -found.fun > 1e-7


def _logistic(design: np.ndarray, points: np.ndarray, queries: np.ndarray) -> tuple[float, float]:
    """(coefficient of the first column, its standard error clustered by query)."""
    from sklearn.linear_model import LogisticRegression

    rows, weights = np.vstack([design, design]), np.concatenate([points, 1 - points])  # so much won, so much lost
    won = np.repeat([1, 0], len(points))
    model = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-10, max_iter=200)
    model.fit(rows[weights > 0], won[weights > 0], weights[weights > 0])
    expected = 1 / (1 + np.exp(-design @ model.coef_[0]))
    bread = np.linalg.inv(design.T @ (design * (expected * (1 - expected))[:, None]))
    clusters = queries.max() + 1
    if clusters < 2:
        return float(model.coef_[0, 0]), np.nan
    scores = np.zeros((clusters, design.shape[1]))
    np.add.at(scores, queries, design * (points - expected)[:, None])
    variance = bread @ (scores.T @ scores) @ bread * clusters / (clusters - 1)
    return float(model.coef_[0, 0]), float(np.sqrt(variance[0, 0]))


def rm_against_elo(rated: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of mean Writing RM score and Elo over checkpoints: a row an arm, and `all` of them pooled:
    arm, spearman, low, high, checkpoints, note.

    `rated`: arm, step, elo, as `elo.over_steps` gives it; `scores`: arm, step, score. The interval is Bonett and Wright's
    (2000): Fisher's z with standard error sqrt((1 + r^2 / 2) / (n - 3)); it takes checkpoints as independent, which
    neighbours in a run are not, so it is rather too narrow. Below four checkpoints there is none.
    """
    both = rated[["arm", "step", "elo"]].merge(scores[["arm", "step", "score"]], on=["arm", "step"], validate="1:1").dropna()
    groups = [*both.groupby("arm"), ("all", both)]
    return pd.DataFrame([{"arm": arm, **_spearman(rows.elo, rows.score)} for arm, rows in groups])


def _spearman(one: pd.Series, other: pd.Series) -> dict:
    n, low, high, note = len(one), np.nan, np.nan, ""
    r = one.rank().corr(other.rank()) if n > 1 else np.nan
    if np.isnan(r):
        note = "fewer than two checkpoints, or one of the two never changes"
    elif n < 4 or abs(r) > 1 - 1e-12:
        note = "no interval: fewer than four checkpoints" if n < 4 else "no interval: the ranks agree or disagree fully"
    else:
        error = 1.96 * np.sqrt((1 + r**2 / 2) / (n - 3))
        low, high = np.tanh(np.arctanh(r) - error), np.tanh(np.arctanh(r) + error)
    return {"spearman": r, "low": low, "high": high, "checkpoints": n, "note": note}
