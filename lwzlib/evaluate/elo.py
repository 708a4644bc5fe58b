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
_STEPS = 200
_CELLS = 2_000_000  # of one batch of resamples, so that 200 players fit into memory too


class ArenaError(ValueError):
    """Judgments that cannot be rated or compared; the message says which and why."""


@dataclass(frozen=True)
class Elo:
    """`table`: a row a player, best first: model, elo, low, high, points, matches, not_finite (share of the resamples in
    which its rating is not finite), note. `separated`: share of the resamples in which any rating is not finite."""

    table: pd.DataFrame
    anchor: str
    resamples: int
    separated: float
    statements: tuple[str, ...]  # what a reader must know; empty if every rating and interval is finite


def win_tie_loss(judgments: pd.DataFrame, model: str | None = None, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """A row a pair of models (of `model` against each other one, if it is given): wins, ties, losses, missing as counts of
    judgments, win_rate (a tie is half) with its 95% interval over queries, `both_orders` (how often a query was judged by
    the same judge in both orders) and `inconsistent`, the share of these in which the two orders gave different results.
    """
    seen = judgments
    if model is not None:
        seen = seen[(seen["first"] == model) | (seen["second"] == model)]
        if seen.empty:
            raise ArenaError(f"no judgment of {model!r}")
    turned = (seen["second"] < seen["first"] if model is None else seen["second"] == model).to_numpy(bool)
    points = points_of(seen)
    seen = seen.assign(model=np.where(turned, seen["second"], seen["first"]), turned=turned,
                       other=np.where(turned, seen["first"], seen["second"]), points=np.where(turned, 1 - points, points))
    return pd.DataFrame([_pair(one, other, rows, resamples, seed) for (one, other), rows in seen.groupby(["model", "other"])])


def _pair(model: str, other: str, rows: pd.DataFrame, resamples: int, seed: int) -> dict:
    rate, low, high = over_queries(rows.query_id, rows.points, resamples, seed)
    orders = rows.pivot_table(index=["judge", "query_id"], columns="turned", values="points").reindex(columns=[False, True])
    orders = orders.dropna()
    wins, ties, losses = ((rows.points == value).sum() for value in (1, 0.5, 0))
    return {"model": model, "other": other, "wins": wins, "ties": ties, "losses": losses, "missing": rows.points.isna().sum(),
            "win_rate": rate, "low": low, "high": high, "both_orders": len(orders),
            "inconsistent": (orders[False] != orders[True]).mean() if len(orders) else np.nan}


def over_queries(queries, values, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of `values` (NaN left out) and its interval, with `queries` resampled; NaN where there is nothing to say."""
    values = np.asarray(values, float)
    known = ~np.isnan(values)
    codes, different = pd.factorize(np.asarray(queries, object)[known], sort=True)
    sums, counts = np.bincount(codes, values[known], len(different)), np.bincount(codes, minlength=len(different))
    return bootstrap_ratio(sums, counts, resamples, seed, level)


def points_of(judgments: pd.DataFrame) -> np.ndarray:
    """What the model shown first gets of each judgment: 1, 0.5, 0, or NaN where the judgment is missing."""
    return judgments.winner.map({"first": 1.0, "tie": 0.5, "second": 0.0}).to_numpy(float)


def points_by_query(judgments: pd.DataFrame, names: list[str], queries: list[str]) -> np.ndarray:
    """(queries, models, models): what each took from each, as `elo.rate` wants it; missing judgments are left out."""
    points, known = np.zeros((len(queries), len(names), len(names))), judgments.dropna(subset="winner")
    at = []
    for given, column in ((queries, "query_id"), (names, "first"), (names, "second")):
        at.append(pd.Index(given, dtype=object).get_indexer(known[column]))
        if (at[-1] < 0).any():
            raise ArenaError(f"{column} {known[column].iloc[at[-1].argmin()]!r} is not among the names given")
    query, first, second = at
    np.add.at(points, (query, first, second), points_of(known))
    np.add.at(points, (query, second, first), 1 - points_of(known))
    return points


def players(judgments: pd.DataFrame) -> tuple[list[str], list[str]]:
    """(models, queries), sorted, so that no result depends on the order of the rows."""
    return sorted({*judgments["first"], *judgments["second"]}), sorted(set(judgments.query_id))


def ratings(judgments: pd.DataFrame, anchor: str, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Elo:
    """Elo of all models, `anchor` at 1000; judgments of several judges are pooled. See `elo.rate`."""
    names, queries = players(judgments)
    found = rate(names, points_by_query(judgments, names, queries), anchor, resamples, seed, level)
    missing = int(judgments.winner.isna().sum())
    said = (f"{missing:,} of {len(judgments):,} judgments are missing and left out",) * (missing > 0)
    return replace(found, statements=said + found.statements)


def over_steps(found: Elo, name: str = STEP) -> pd.DataFrame:
    """Of the models whose name carries a step (as in the paper's Figure 3): arm, step, elo, low, high, note."""
    steps = found.table.model.str.extract(f"^{name}$")
    rows = found.table.assign(arm=steps.arm, step=steps.step).dropna(subset="step").astype({"step": int})
    return rows[["arm", "step", "elo", "low", "high", "note"]].sort_values(["arm", "step"], ignore_index=True)


def rate(names: list[str], points: np.ndarray, anchor: str, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Elo:
    """Ratings of M players from points (queries, M, M): [q, i, j] is what i took from j at q, 1 a win and 0.5 a tie.

    Intervals are percentiles over resampled queries, taken at order statistics. A resample without a finite rating counts
    as what it is, +inf or -inf, and one that says nothing (NaN) widens both ends. Whose rating is not finite has the end
    that is known, and NaN for the other: resampling cannot say how far off it is. Raises ArenaError for an unknown anchor,
    a player without any match, and points that are negative or not finite.
    """
    points = np.asarray(points, float)
    points = points[points.any((1, 2))]  # a query without any judgment is none
    if anchor not in names:
        raise ArenaError(f"no match of the baseline {anchor!r}; there are {', '.join(map(repr, names)) or 'no players'}")
    at, total = names.index(anchor), points.sum(0)
    if idle := [name for name, played in zip(names, total.sum(0) + total.sum(1), strict=True) if played == 0]:
        raise ArenaError(f"players without any match: {', '.join(idle)}")
    elo = fit(total, at)
    drawn = bootstrap(points, lambda some: fit(some, at), resamples, seed)
    low, high = percentile_ends(drawn, level)
    low, high = np.where(np.isfinite(elo) | (elo < 0), low, np.nan), np.where(np.isfinite(elo) | (elo > 0), high, np.nan)
    if len(points) < 2:
        low = high = np.where(np.arange(len(names)) == at, ANCHOR_ELO, np.nan)
    lost = (~np.isfinite(drawn)).mean(0)
    notes = [_note(value, share, anchor) for value, share in zip(elo, lost, strict=True)]
    table = pd.DataFrame({"model": names, "elo": elo, "low": low, "high": high, "points": total.sum(1),
                          "matches": total.sum(0) + total.sum(1), "not_finite": lost, "note": notes})
    table = table.sort_values(["elo", "model"], ascending=[False, True], ignore_index=True)
    said = tuple(f"{name}: {note}" for name, note in zip(table.model, table.note, strict=True) if note)
    said += ("one query only: no interval",) * (len(points) < 2)
    return Elo(table, anchor, resamples, float((~np.isfinite(drawn)).any(1).mean()), said)


def _note(elo: float, share: float, anchor: str) -> str:
    if elo == np.inf:
        return f"+inf: it, or those it beats, took points towards {anchor} and never lost any on the way back"
    if elo == -np.inf:
        return f"-inf: it, or those it loses to, lost points towards {anchor} and never took any on the way back"
    if np.isnan(elo):
        return f"no rating: no chain of won points links it with {anchor} in either direction"
    return f"in {share:.1%} of the resamples not finite, counted as infinite in the interval" if share else ""


def fit(points: np.ndarray, anchor: int) -> np.ndarray:
    """Ratings (..., M) of the points (..., M, M) that each took from each, with `anchor` at 1000.

    +inf: points lead from the player to the anchor and none back; -inf: the other way round; NaN: neither. Raises
    ArenaError for points that are no such matrix.
    """
    logits, reach = _strengths(points)
    up, down = reach[..., :, anchor], reach[..., anchor, :]
    elo = ANCHOR_ELO + ELO_PER_LOGIT * (logits - logits[..., anchor, None])
    return np.select([up & down, up, down], [elo, np.inf, -np.inf], np.nan)


def order(points: np.ndarray) -> np.ndarray:
    """Of each two players in points (..., M, M): 1 where i stands above j, -1 below, 0 equal or not comparable."""
    logits, reach = _strengths(points)
    back = reach.swapaxes(-1, -2)
    difference = np.round(logits[..., :, None] - logits[..., None, :], 9)
    return np.where(reach & back, np.sign(difference), reach.astype(int) - back).astype(int)


def bootstrap(points: np.ndarray, statistic: Callable, resamples: int, seed: int) -> np.ndarray:
    """`statistic` (of (B, M, M), for each of B) of the points of as many queries as there are, drawn with replacement."""
    queries, players, _ = points.shape
    flat, weights = points.reshape(queries, -1), resample_counts(queries, resamples, seed)
    chunks = np.array_split(weights, max(1, resamples * players**2 // _CELLS))
    return np.concatenate([statistic((some @ flat).reshape(-1, players, players)) for some in chunks])


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
    linked = reach & reach.swapaxes(-1, -2)
    return _maximum(np.where(linked, points, 0), linked.argmax(-1) != np.arange(players)), reach


def _maximum(points: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Logits (..., M) by Newton's method; whoever is not `free` (..., M) stays at 0.

    A step is cut to log(1 + c) / c of its length, c being the widest change of a difference that it makes. The third
    derivative of the logistic loss is bounded by its second, so that each cut step gains (Bach 2010, doi
    10.1214/09-EJS521); near the maximum the cut vanishes.
    """
    from scipy.special import expit

    both, one = free[..., :, None] & free[..., None, :], np.eye(points.shape[-1])
    games, logits = points + points.swapaxes(-1, -2), np.zeros(points.shape[:-1])
    for _ in range(_STEPS):
        expected = expit(logits[..., :, None] - logits[..., None, :])
        gradient = np.where(free, (points - games * expected).sum(-1), 0)
        weight = games * expected * (1 - expected)
        curvature = np.where(both, one * weight.sum(-1)[..., None] - weight, one)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        width = np.ptp(step, axis=-1, keepdims=True)
        logits += step * np.where(width > 0, np.log1p(width) / np.maximum(width, 1e-300), 1)
        if width.max() < 1e-8:  # the error is squared by every step, so it is far smaller now
            return logits
    raise ArenaError(f"no maximum within {_STEPS} steps; are the points of very different size?")
