"""Win rates and ratings from judgments (`arena.COLUMNS`): Bradley-Terry by maximum likelihood, intervals over queries.

The paper reports Elo on Arena-Write, not how it was fitted. Here P(i beats j) = 1 / (1 + 10^((r_j - r_i) / 400)), a tie is
half a win for each, and one player, the anchor, stands at 1000. All judgments of one query share its prompt and its texts,
so whole queries are resampled, never single judgments.

The likelihood has a maximum only between players of whom each, directly or through others, took points from every other
(Ford 1957, doi 10.2307/2308513). Whoever is not so linked to the anchor gets +inf, -inf or NaN and a sentence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lwzlib.evaluate.intervals import bootstrap_ratio, percentile_ends, resample_counts

STEP = r"(?P<arm>.+)@(?P<step>\d+)"  # how a model's name carries its RL step: base-think@20
ANCHOR_ELO = 1000.0
ELO_PER_LOGIT = 400 / np.log(10)
_NEWTON_STEPS = 200
_CELLS_AT_ONCE = 2_000_000  # of one batch of resamples, so that 200 players fit into memory too


class ArenaError(ValueError):
    """Judgments that cannot be rated or compared; the message says which and why."""


@dataclass(frozen=True)
class Elo:
    """`table`: a row per player, best first: model, elo, low, high, points, matches, not_finite (share of the resamples in
    which its rating is not finite), note. `statements`: what a reader must know; none if all ratings and ends are finite."""

    table: pd.DataFrame
    anchor: str
    statements: tuple[str, ...]


def win_tie_loss(judgments: pd.DataFrame, model: str | None = None, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """A row per pair of models (`model` against each other one, if it is given): wins, ties, losses, missing as counts of
    judgments, win_rate (a tie is half) with its 95% interval over queries, `both_orders` (how often a query was judged by
    the same judge in both orders) and `inconsistent`, the share of these in which the two orders gave different results.
    """
    if model is not None:
        judgments = judgments[(judgments["first"] == model) | (judgments["second"] == model)]
        if judgments.empty:
            raise ArenaError(f"no judgment of {model!r}")
    first, second, points = judgments["first"], judgments["second"], points_of(judgments)
    turned = (second < first if model is None else second == model).to_numpy(bool)
    rows = judgments.assign(model=np.where(turned, second, first), other=np.where(turned, first, second), turned=turned,
                            points=np.where(turned, 1 - points, points))
    return pd.DataFrame([_pair(one, other, own, resamples, seed) for (one, other), own in rows.groupby(["model", "other"])])


def _pair(model: str, other: str, rows: pd.DataFrame, resamples: int, seed: int) -> dict:
    rate, low, high = mean_over_queries(rows.query_id, rows.points, resamples, seed)
    orders = rows.pivot_table(index=["judge", "query_id"], columns="turned", values="points").reindex(columns=[False, True])
    both = orders.dropna()
    wins, ties, losses = ((rows.points == value).sum() for value in (1, 0.5, 0))
    return {"model": model, "other": other, "wins": wins, "ties": ties, "losses": losses, "missing": rows.points.isna().sum(),
            "win_rate": rate, "low": low, "high": high, "both_orders": len(both),
            "inconsistent": (both[False] != both[True]).mean() if len(both) else np.nan}


def mean_over_queries(queries, values, resamples: int, seed: int) -> tuple[float, float, float]:
    """(mean of `values`, NaN left out, and its 95% interval with `queries` resampled); NaN where nothing can be said."""
    known = pd.Series(np.asarray(values, float), index=np.asarray(queries, object)).dropna().groupby(level=0)
    return bootstrap_ratio(known.sum(), known.count(), resamples, seed)


def points_of(judgments: pd.DataFrame) -> np.ndarray:
    """Points of the model shown first in each judgment: 1, 0.5, 0, or NaN where the judgment is missing."""
    return judgments.winner.map({"first": 1.0, "tie": 0.5, "second": 0.0}).to_numpy(float)


def points_by_query(judgments: pd.DataFrame, names: list[str], queries: list[str]) -> np.ndarray:
    """Points (queries, models, models) that each took from each, as `rate_points` wants them, without missing judgments."""
    known, places = judgments.dropna(subset="winner"), []
    for column, values in (("query_id", queries), ("first", names), ("second", names)):
        places.append(pd.Index(values, dtype=object).get_indexer(known[column]))
        if (places[-1] < 0).any():
            raise ArenaError(f"{column} {known[column].iloc[places[-1].argmin()]!r} is not among the names given")
    query, first, second = places
    points = np.zeros((len(queries), len(names), len(names)))
    np.add.at(points, (query, first, second), points_of(known))
    np.add.at(points, (query, second, first), 1 - points_of(known))
    return points


def players(judgments: pd.DataFrame) -> tuple[list[str], list[str]]:
    """(models, queries), sorted, so that no result depends on the order of the rows."""
    return sorted({*judgments["first"], *judgments["second"]}), sorted(set(judgments.query_id))


def ratings(judgments: pd.DataFrame, anchor: str, resamples: int = 1000, seed: int = 0) -> Elo:
    """Elo of all models, `anchor` at 1000; judgments of several judges are pooled. See `rate_points`."""
    names, queries = players(judgments)
    rated = rate_points(names, points_by_query(judgments, names, queries), anchor, resamples, seed)
    if missing := int(judgments.winner.isna().sum()):
        statement = f"{missing:,} of {len(judgments):,} judgments are missing and left out"
        rated = replace(rated, statements=(statement, *rated.statements))
    return rated


def over_steps(rated: Elo) -> pd.DataFrame:
    """Ratings of the models whose name carries a step (as in the paper's Figure 3): arm, step, elo, low, high, note."""
    steps = rated.table.model.str.extract(f"^{STEP}$")
    rows = rated.table.assign(arm=steps.arm, step=steps.step).dropna(subset="step").astype({"step": int})
    return rows[["arm", "step", "elo", "low", "high", "note"]].sort_values(["arm", "step"], ignore_index=True)


def rate_points(names: list[str], points: np.ndarray, anchor: str, resamples: int = 1000, seed: int = 0) -> Elo:
    """Ratings of M players from points (queries, M, M): [q, i, j] is what i took from j at q, 1 a win and 0.5 a tie.

    Intervals are 95% percentiles over resampled queries, taken at order statistics. A resample without a finite rating
    counts as what it is, +inf or -inf, and one that says nothing (NaN) widens both ends. Whose rating is not finite has the
    end that is known, and NaN for the other: resampling cannot say how far off it is. Raises ArenaError for an unknown
    anchor, a player without any match, and points that are negative or not finite.
    """
    points = np.asarray(points, float)
    points = points[points.any((1, 2))]  # a query without any judgment is none
    if anchor not in names:
        raise ArenaError(f"no match of the baseline {anchor!r}; there are {', '.join(map(repr, names)) or 'no players'}")
    at, won, lost = names.index(anchor), points.sum((0, 2)), points.sum((0, 1))
    if idle := [name for name, played in zip(names, won + lost, strict=True) if played == 0]:
        raise ArenaError(f"players without any match: {', '.join(idle)}")
    elo = fit_ratings(points.sum(0), at)
    drawn = bootstrap_points(points, lambda resampled: fit_ratings(resampled, at), resamples, seed)
    low, high = percentile_ends(drawn)
    # An infinite rating keeps the end that is known; one query says nothing of any end but the anchor's.
    low, high = np.where(np.isfinite(elo) | (elo < 0), low, np.nan), np.where(np.isfinite(elo) | (elo > 0), high, np.nan)
    if len(points) < 2:
        low = high = np.where(np.arange(len(names)) == at, ANCHOR_ELO, np.nan)
    not_finite = (~np.isfinite(drawn)).mean(0)
    notes = [_note(value, share, anchor) for value, share in zip(elo, not_finite, strict=True)]
    table = pd.DataFrame({"model": names, "elo": elo, "low": low, "high": high, "points": won, "matches": won + lost,
                          "not_finite": not_finite, "note": notes})
    table = table.sort_values(["elo", "model"], ascending=[False, True], ignore_index=True)
    statements = [f"{name}: {note}" for name, note in zip(table.model, table.note, strict=True) if note]
    return Elo(table, anchor, (*statements, *["one query only: no interval"] * (len(points) < 2)))


def _note(elo: float, not_finite: float, anchor: str) -> str:
    if elo == np.inf:
        return f"+inf: it, or those it beats, took points towards {anchor} and never lost any on the way back"
    if elo == -np.inf:
        return f"-inf: it, or those it loses to, lost points towards {anchor} and never took any on the way back"
    if np.isnan(elo):
        return f"no rating: no chain of won points links it with {anchor} in either direction"
    return f"in {not_finite:.1%} of the resamples not finite, counted as infinite in the interval" if not_finite else ""


def fit_ratings(points: np.ndarray, anchor: int) -> np.ndarray:
    """Ratings (..., M) from the points (..., M, M) that each took from each, with the player `anchor` at 1000.

    +inf: points lead from the player to the anchor and none back; -inf: the other way round; NaN: neither. Raises
    ArenaError for points that are no such matrix.
    """
    logits, reach = _strengths(points)
    up, down = reach[..., :, anchor], reach[..., anchor, :]
    elo = ANCHOR_ELO + ELO_PER_LOGIT * (logits - logits[..., anchor, None])
    return np.select([up & down, up, down], [elo, np.inf, -np.inf], np.nan)


def pairwise_order(points: np.ndarray) -> np.ndarray:
    """Order (..., M, M) of each two players by points (..., M, M): 1 where i stands above j, -1 below, 0 equal or not
    comparable."""
    logits, reach = _strengths(points)
    back = reach.swapaxes(-1, -2)
    difference = np.round(logits[..., :, None] - logits[..., None, :], 9)
    return np.where(reach & back, np.sign(difference), reach.astype(int) - back).astype(int)


def bootstrap_points(points: np.ndarray, statistic: Callable, resamples: int, seed: int) -> np.ndarray:
    """`statistic` (of (B, M, M), for each of B) of the points of as many queries as there are, drawn with replacement."""
    queries, players, _ = points.shape
    flat, counts = points.reshape(queries, -1), resample_counts(queries, resamples, seed)
    batches = np.array_split(counts, max(1, resamples * players**2 // _CELLS_AT_ONCE))
    return np.concatenate([statistic((batch @ flat).reshape(-1, players, players)) for batch in batches])


def _strengths(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (..., M) of greatest likelihood, and reach (..., M, M): whether a chain of players, each of whom took points
    from the next, leads from i to j. Logits compare only players who reach each other; the first of each such set is at 0."""
    points = np.asarray(points, float)
    if points.ndim < 2 or points.shape[-1] != points.shape[-2]:
        raise ArenaError(f"points must be (players, players), not {points.shape}")
    if not (np.isfinite(points).all() and (points >= 0).all()):
        raise ArenaError("points must be finite and not negative")
    if np.diagonal(points, axis1=-2, axis2=-1).any():
        raise ArenaError("a player cannot play against itself")
    players = points.shape[-1]
    reach = (points > 0) | np.eye(players, dtype=bool)
    for _ in range(players.bit_length()):  # a chain of 2^k players is found after k rounds
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    linked = reach & reach.swapaxes(-1, -2)  # sets of players who reach each other
    is_first = linked.argmax(-1) == np.arange(players)
    return _maximum(np.where(linked, points, 0), ~is_first), reach


def _maximum(points: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Logits (..., M) that maximise the Bradley-Terry likelihood, by Newton's method; who is not `free` (..., M) stays at 0.

    A step is cut to log(1 + c) / c of its length, c being the widest change of a difference that it makes. The third
    derivative of the logistic loss is bounded by its second, so that each cut step gains (Bach 2010, doi
    10.1214/09-EJS521); near the maximum the cut vanishes.
    """
    from scipy.special import expit

    identity = np.eye(points.shape[-1])
    both_free = free[..., :, None] & free[..., None, :]
    games, logits = points + points.swapaxes(-1, -2), np.zeros(points.shape[:-1])
    for _ in range(_NEWTON_STEPS):
        win_chance = expit(logits[..., :, None] - logits[..., None, :])
        gradient = np.where(free, (points - games * win_chance).sum(-1), 0)
        weights = games * win_chance * (1 - win_chance)
        laplacian = identity * weights.sum(-1)[..., None] - weights  # minus the Hessian
        step = np.linalg.solve(np.where(both_free, laplacian, identity), gradient[..., None])[..., 0]
        width = np.ptp(step, axis=-1, keepdims=True)
        logits += step * np.where(width > 0, np.log1p(width) / np.maximum(width, 1e-300), 1)
        if width.max() < 1e-8:  # each step squares the error, so by now it is far smaller
            return logits
    raise ArenaError(f"no maximum within {_NEWTON_STEPS} steps; are the points of very different size?")
