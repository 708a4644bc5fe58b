"""Length control: are texts longer where longer ones were asked for?

Asked for is the middle of a query's word range. The correlation r is Spearman's, over the held-out queries of one arm, seed and
phase. It is also the mean of one value a query, r + xy - r (x^2 + y^2) / 2 of the standardised ranks x and y: its first-order
influence (Devlin, Gnanadesikan and Kettenring 1975). So the ledger's intervals over queries and over seeds hold for it as for a
reward. Beside it stands S_l, LongBench-Write's score of a length.
"""

import numpy as np
import pandas as pd
from scipy import stats

from lwzlib.evaluate.intervals import t_interval
from lwzlib.evaluate.longbench import length_score

OF_SAMPLES = ["arm", "seed", "phase", "step"]


def with_length_control(held_out: pd.DataFrame) -> pd.DataFrame:
    """A held-out table with the columns `length_control`, whose mean over the queries of a seed is the rank correlation of
    words asked for and written (NaN where all of either are alike), and `S_l`, 0-100; as it is without `asked_words`."""
    if "asked_words" not in held_out or held_out.asked_words.isna().all():
        return held_out
    keys = [name for name in ("setting", *OF_SAMPLES) if name in held_out]
    of_samples, known = held_out.groupby(keys, dropna=False), held_out.asked_words.notna()
    x, y = (of_samples[name].transform(_standard_ranks) for name in ("asked_words", "answer_words"))
    r = (x * y).groupby([held_out[name] for name in keys], dropna=False).transform("mean")
    s_l = [length_score(*pair) if is_known else np.nan for is_known, *pair in zip(
        known, held_out.asked_words, held_out.answer_words, strict=True)]
    return held_out.assign(length_control=r + x * y - r * (x**2 + y**2) / 2, S_l=s_l)


def _standard_ranks(values: pd.Series) -> pd.Series:
    ranks = values.rank()
    return (ranks - ranks.mean()) / ranks.std(ddof=0) if ranks.nunique() > 1 else ranks * np.nan


def length_table(held_out: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of words asked for and written, before and after: a row per arm and phase, with its 95% interval (over
    seeds by Student's t, of one seed over queries by Fisher's z), mean S_l, the seeds that have one, queries. Empty without
    `asked_words`."""
    table, rows = with_length_control(held_out), []
    known = table.dropna(subset="asked_words") if "length_control" in table else table.iloc[:0]
    for (arm, phase), samples in known[known.phase != "during"].groupby(["arm", "phase"], sort=False):
        of_seeds = samples.groupby("seed").length_control.mean().dropna()
        low, high = t_interval(of_seeds) if len(of_seeds) != 1 else _fisher(of_seeds.iloc[0], samples.id.nunique())
        rows.append({"arm": arm, "phase": phase, "correlation": of_seeds.mean(), "low": low, "high": high,
                     "S_l": samples.S_l.mean(), "seeds": len(of_seeds), "queries": samples.id.nunique()})
    return pd.DataFrame(rows, columns=["arm", "phase", "correlation", "low", "high", "S_l", "seeds", "queries"])


def _fisher(correlation: float, queries: int) -> tuple[float, float]:
    """95% interval of a rank correlation (Bonett and Wright 2000: variance (1 + r^2 / 2) / (n - 3) of Fisher's z)."""
    if queries < 4 or not abs(correlation) < 1:
        return np.nan, np.nan
    half = stats.norm.ppf(0.975) * np.sqrt((1 + correlation**2 / 2) / (queries - 3))
    return tuple(np.tanh(np.arctanh(correlation) + half * np.array([-1, 1])))
