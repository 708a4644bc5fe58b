"""Results tables of the committed form, made by hand: a run of three arms and two SFT arms whose scores are known."""

import pandas as pd

ABOUT = {"model": "kit:tiny", "fingerprint": "0123456789abcdef", "commit": "0123456789abcdef0123456789abcdef01234567",
         "hardware": "a desk", "versions": "torch 9.9"}
ARMS = {"base-nothink": ("grpo", "base", 0.0, 1.0), "base-think": ("grpo", "base", -1.0, 2.0),
        "continual-pretrain-think": ("grpo", "continual-pretrain", 1.0, 3.0), "sft": ("sft", "base", 0.0, 0.5),
        "continual-pretrain-sft": ("sft", "continual-pretrain", 0.3, 0.8)}
STEPS, QUERIES = 8, 12
_FOLLOWED = {"before": 0.2, "during": 0.5, "after": 0.8}  # of a difference in the words that were asked for


def held_out(seeds=(0, 1, 2), arms=ARMS) -> pd.DataFrame:
    """Samples whose writing score goes from the arm's start to its end; queries and seeds shift all arms alike."""
    rows = []
    for arm, (algorithm, start, first, last) in arms.items():
        for seed in seeds:
            phases = [("before", 0, first), ("during", STEPS // 2, (first + last) / 2), ("after", STEPS, last)]
            for phase, step, mean in phases if algorithm == "grpo" else (phases[0], phases[2]):
                for query in range(QUERIES):
                    noise = ((7 * query + 3 * seed + len(arm) + 5 * step) % 11 - 5) / 2
                    rows.append({
                        **ABOUT, "arm": arm, "algorithm": algorithm, "start": start, "seed": seed, "phase": phase,
                        "judge": f"judge-of-seed-{seed}", "step": step if algorithm == "grpo" else None, "id": f"q{query}",
                        "length": 0.5 + noise / 5, "writing": mean + noise, "format": 0.9, "think_words": 9,
                        "asked_words": 20 + 15 * query, "truncated": query == 0,
                        "answer_words": round(90 + _FOLLOWED[phase] * (15 * query - 80) + 4 * noise)})
    return pd.DataFrame(rows).astype({"step": "Int64"}).round(4)


def rl(seeds=(0, 1, 2), arms=tuple(ARMS)[:3], steps=STEPS) -> pd.DataFrame:
    """RL rows that rise step by step, with a plan that stays as long as it is."""
    return pd.DataFrame([
        {**ABOUT, "arm": arm, "seed": seed, "step": step, "length": 0.4 + 0.05 * step, "writing": ARMS[arm][2] + 0.25 * step,
         "format": 0.9, "think_tokens": 40 + (step + seed) % 2, "answer_words": 60.0, "answer_words_not_truncated": 58.0 + step,
         "truncated": 0.1} for arm in arms for seed in seeds for step in range(1, steps + 1)]).round(4)


def write(folder, setting="nano", **tables):
    """`<setting>.csv` and what else is named, such as held_out=...; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, table in tables.items():
        table.to_csv(folder / (f"{setting}.csv" if kind == "rl" else f"{setting}_{kind}.csv"), index=False)
    return folder
