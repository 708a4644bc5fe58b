"""Bootstrap intervals over queries: what was sampled are the queries, so whole queries are drawn again."""

import numpy as np


def ratio(above, below, resamples: int = 5000, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """sum(above) / sum(below), one pair a query, with its percentile interval; with `below` all 1, a mean. NaN where there is
    no query, and for the ends where there are fewer than two, or no resamples."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    if not len(above):
        return np.nan, np.nan, np.nan
    value = float(above.sum() / below.sum())
    if len(above) < 2 or not resamples:
        return value, np.nan, np.nan
    weights = resample(len(above), resamples, seed)
    low, high = percentiles((weights @ above) / (weights @ below), level)
    return value, float(low), float(high)


def mean(values, resamples: int = 5000) -> tuple[float, float, float]:
    """Mean of one value a query, with its 95% interval."""
    return ratio(values, np.ones(len(values)), resamples)


def resample(queries: int, resamples: int, seed: int) -> np.ndarray:
    """How often each query is drawn: (resamples, queries), rows sum to `queries`."""
    return np.random.default_rng(seed).multinomial(queries, np.full(queries, 1 / queries), size=resamples).astype(float)


def percentiles(drawn: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) over the first axis, at order statistics; NaN counts as -inf for low and +inf for high."""
    tail = (1 - level) / 2
    low = np.quantile(np.where(np.isnan(drawn), -np.inf, drawn), tail, axis=0, method="lower")
    return low, np.quantile(np.where(np.isnan(drawn), np.inf, drawn), 1 - tail, axis=0, method="higher")
