"""Intervals of Elo: 1,000 resamples of 100 prompts x 12 models, against arena-hard-auto's way of fitting.

The judgments are simulated: every pair of 12 models on 100 prompts in both orders, 13,200 in all, one in ten a tie. The kit
resamples prompts and fits all resamples at once (`elo.rate_points`, point estimate and table included). The other way, as in
the Bradley-Terry version of arena-hard-auto, is written anew here: it resamples single judgments, writes each as two rows of a
design with a column a model, a tie as a win and a loss, and fits scikit-learn's LogisticRegression without penalty and
intercept, once a resample. Some of its resamples are timed, in turns with the kit, and scaled to 1,000. Both are given
judgments that are in memory; both fit the whole table once, and the ratings are compared.

    python benchmarks/elo_bootstrap.py [--rounds 5] [--sample 10]
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from sklearn.linear_model import LogisticRegression

from lwzlib.base.provenance import provenance
from lwzlib.evaluate import elo

HERE = Path(__file__).resolve().parent
PROMPTS, MODELS, RESAMPLES = 100, 12, 1000


def judgments(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    names, strengths = [f"model-{i:02}" for i in range(MODELS)], rng.normal(1000, 200, MODELS)
    rows = []
    for prompt, (i, j) in itertools.product(range(PROMPTS), itertools.permutations(range(MODELS), 2)):
        wins = rng.random() < 1 / (1 + 10 ** ((strengths[j] - strengths[i]) / 400))
        winner = "tie" if rng.random() < 0.1 else "first" if wins else "second"
        rows.append({"query_id": f"{prompt:03}", "first": names[i], "second": names[j], "winner": winner, "judge": "simulated"})
    return pd.DataFrame(rows)


def regression(table: pd.DataFrame, anchor: str) -> pd.Series:
    """One fit in arena-hard-auto's way: every judgment two rows, a tie one of each."""
    names = sorted({*table["first"], *table["second"]})
    twice = pd.concat([table, table], ignore_index=True)
    design, rows = np.zeros((len(twice), len(names))), np.arange(len(twice))
    for side, sign in (("first", 1), ("second", -1)):
        design[rows, pd.Index(names).get_indexer(twice[side])] = sign * np.log(10)
    won = (twice.winner == "first") | ((twice.winner == "tie") & (rows < len(table)))
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8)
    ratings = pd.Series(400 * model.fit(design, won).coef_[0], names)
    return ratings - ratings[anchor] + 1000


def main(rounds: int, sample: int) -> None:
    table, anchor, origin = judgments(), "model-00", provenance()
    ours, theirs = elo.ratings(table, anchor).table.set_index("model").elo, regression(table, anchor)
    gap = (ours - theirs).abs().max()
    kit_s, fit_s = [], []
    for i in range(rounds):
        start = time.perf_counter()
        elo.ratings(table, anchor, resamples=RESAMPLES, seed=i)
        kit_s.append(time.perf_counter() - start)
        for seed in range(sample):
            start = time.perf_counter()
            regression(table.sample(frac=1.0, replace=True, random_state=i * sample + seed), anchor)
            fit_s.append(time.perf_counter() - start)
        print(f"round {i + 1}/{rounds}  kit {kit_s[-1]:.3f} s for {RESAMPLES:,}  "
              f"regression {statistics.median(fit_s[-sample:]):.3f} s for one", flush=True)
    kit, scaled = statistics.median(kit_s), statistics.median(fit_s) * RESAMPLES
    lines = [
        "# Elo with intervals", "", f"{origin['hardware']}; {origin['started']}; Python {origin['python']}, "
        f"numpy {np.__version__}, scikit-learn {sklearn.__version__}.", "",
        f"{RESAMPLES:,} resamples of {PROMPTS} prompts x {MODELS} models, {len(table):,} judgments.",
        f"Medians of {rounds} rounds; of the regression {len(fit_s)} resamples were timed and scaled.",
        f"On the whole table both rate alike, to {gap:.0e} Elo.", "",
        "| way | 1,000 resamples, s | fastest, s | slowest, s |", "|---|--:|--:|--:|",
        f"| kit: prompts resampled, all fitted at once | {kit:.3f} | {min(kit_s):.3f} | {max(kit_s):.3f} |",
        f"| a regression a resample, judgments resampled | {scaled:.0f} | {min(fit_s) * RESAMPLES:.0f} | "
        f"{max(fit_s) * RESAMPLES:.0f} |", "",
        f"Ratio of the medians: {scaled / kit:,.0f}; with the kit's slowest against the other's fastest: "
        f"{min(fit_s) * RESAMPLES / max(kit_s):,.0f}."]
    print("\n".join(["", *lines]))
    (HERE / "elo_bootstrap.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=10, help="regressions a round")
    options = parser.parse_args()
    if options.rounds < 1 or options.sample < 1:
        parser.error("--rounds and --sample must be at least 1")
    main(options.rounds, options.sample)
