"""Confidence intervals, 95%, one for each kind of question.

  bootstrap_mean, bootstrap_ratio   would other queries give another score? Percentile bootstrap; whole queries are drawn again
  t_interval                        would other seeds or steps, few of them, give another mean? Student's t
  (a share of preference pairs has Wilson's, by scipy's `binomtest`, in `train_writing_rm`)

The bootstrap is our own, although scipy has one: Elo, kappa and tau need the same resamples as weights of queries, all at
once, some of them infinite or undefined; and all numbers shown were drawn so (scipy draws others).
"""

import numpy as np

_TAIL = (1 - 0.95) / 2


def bootstrap_mean(values, resamples: int = 5000) -> tuple[float, float, float]:
    """(mean, low, high) of one value per query; see `bootstrap_ratio`."""
    return bootstrap_ratio(values, np.ones(len(values)), resamples)


def bootstrap_ratio(numerators, denominators, resamples: int = 5000, seed: int = 0) -> tuple[float, float, float]:
    """(sum(numerators) / sum(denominators), low, high), with one pair per query, kept together when queries are resampled.
    All NaN without a query; the ends are NaN with a single query, or without resamples."""
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    if not len(numerators):
        return np.nan, np.nan, np.nan
    value = float(numerators.sum() / denominators.sum())
    if len(numerators) < 2 or not resamples:
        return value, np.nan, np.nan
    counts = resample_counts(len(numerators), resamples, seed)
    low, high = percentile_ends((counts @ numerators) / (counts @ denominators))
    return value, float(low), float(high)


def resample_counts(queries: int, resamples: int, seed: int) -> np.ndarray:
    """How often each query is drawn: (resamples, queries); each row sums to `queries`."""
    return np.random.default_rng(seed).multinomial(queries, np.full(queries, 1 / queries), size=resamples).astype(float)


def percentile_ends(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) over the first axis, at order statistics; NaN counts as -inf for low and as +inf for high."""
    low = np.quantile(np.where(np.isnan(drawn), -np.inf, drawn), _TAIL, axis=0, method="lower")
    return low, np.quantile(np.where(np.isnan(drawn), np.inf, drawn), 1 - _TAIL, axis=0, method="higher")


def t_interval(values) -> tuple[float, float]:
    """(low, high) of the mean of independent values; NaN for fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return np.nan, np.nan
    mean, half = np.mean(values), stats.t.ppf(1 - _TAIL, len(values) - 1) * stats.sem(values)
    return float(mean - half), float(mean + half)  # equal values give an interval without width; scipy's t.interval gives NaN
