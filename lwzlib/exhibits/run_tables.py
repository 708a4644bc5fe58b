"""Run folders as tables: a row an RL step, a row a held-out sample, a row a source of the pretraining tokens."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from lwzlib.base.provenance import commit_of
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import read_rows
from lwzlib.evaluate import intervals

REWARDS = ("length", "writing", "format")
_KEPT = ("length", "writing", "format", "think_words", "answer_words", "think_tokens", "answer_tokens", "completion_tokens",
         "answer_words_not_truncated", "truncated", "groups_without_variance", "entropy", "loss", "step_s")


def mixture_rows(folder: Path) -> pd.DataFrame:
    """What a run folder's `pack` drew from each source, in the committed form; empty if nothing was packed."""
    pack = Path(folder) / "pack"
    table = mixture_table(pack)
    if table.empty:
        return table
    about = made_by(pack) | {"arm": "continual-pretrain"}
    return table.assign(**about)[[*about, *table.columns]]


def run_table(folder: str | Path) -> pd.DataFrame:
    """The GRPO rows of every arm in a run folder, each with its provenance. Empty if there are none."""
    tables = []
    for grpo in sorted(Path(folder).glob("*/grpo")):
        rows = pd.DataFrame(read_rows(grpo / "metrics.jsonl"))
        if rows.empty:
            continue
        about = made_by(grpo)
        kept = rows[["step", *(c for c in _KEPT if c in rows)]]
        tables.append(kept.assign(**about)[[*about, *kept.columns]])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["arm", "seed", "step"])


def made_by(stage: Path) -> dict:
    """Where the rows of an arm's stage come from."""
    made, status = (json.loads((stage / f"{name}.json").read_text()) for name in ("provenance", "status"))
    asked = yaml.safe_load((stage / "recipe.yaml").read_text())
    return {"model": asked["model"]["name"], "arm": stage.parent.name, "seed": asked["seed"],
            "fingerprint": status["fingerprint"], "commit": commit_of(made), "hardware": made["hardware"],
            "versions": " ".join(f"{name} {v}" for name, v in made["versions"].items())}


def held_out_table(folder: str | Path, during: bool = False) -> pd.DataFrame:
    """The held-out samples of every arm in a run folder, a row each: where they come from, judge (the Writing RM's identity),
    algorithm, start, phase (before, after; `during` RL too), step (of RL), id, rewards, lengths, texts. Empty if none."""
    found, known = [], list(load_recipe("paper").arms)
    arms = {path.parent.name for path in Path(folder).glob("*/samples-*")}
    for arm in sorted(arms, key=lambda arm: (known.index(arm) if arm in known else len(known), arm)):
        for phase in ("before", *["during"] * during, "after"):
            stage = Path(folder) / arm / f"samples-{phase}"
            paths = sorted(stage.glob("samples*.jsonl"), key=lambda path: (len(path.stem), path.stem))
            if not paths:
                continue
            asked = yaml.safe_load((stage / "recipe.yaml").read_text())
            algorithm, start = (asked["inputs"].get(name, old) for name, old in (("algorithm", "grpo"), ("start", "base")))
            about = made_by(stage) | {"judge": judge_of(folder, asked, arm), "algorithm": algorithm, "start": start,
                                      "phase": phase}
            for path in paths:
                step = {"before": 0, "during": path.stem.rpartition("_")[2], "after": asked.get("grpo", {}).get("steps")}[phase]
                known_step = {"step": int(step) if algorithm == "grpo" else None}
                found += [about | row | known_step for row in read_rows(path)]
    return pd.DataFrame(found, columns=None if found else ["arm", "algorithm", "start", "seed", "phase", "step", "id"])


def judge_of(folder: str | Path, asked: dict, arm: str) -> str:
    """Identity of the Writing RM that scored an arm's samples, by the recipe of that stage; "" where none did."""
    reward = asked.get("reward", {})
    named = reward.get("writing", {}).get("model", "") if reward.get("weights", {}).get("writing") else ""
    places = [Path(folder) / arm / "writing-rm", Path(folder) / "writing-rm"]
    models = [place / "model" for place in places] if named == "stage" else [Path(named)]
    found = [model / "writing_rm.json" for model in models if (model / "writing_rm.json").is_file()]
    return json.loads(found[0].read_text())["identity"] if named and found else ""


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Of a held-out table: mean of each reward before and after, and the difference over the queries that have both,
    with its 95% interval. A row an arm and reward."""
    out = []
    for reward in (name for name in REWARDS if name in table):
        for arm, rows in table.groupby("arm", sort=False):
            pairs = rows.pivot(index="id", columns="phase", values=reward).reindex(columns=["before", "after"]).dropna()
            if len(pairs):
                difference, low, high = intervals.bootstrap_mean(pairs.after - pairs.before)
                out.append({"arm": arm, "reward": reward, "queries": len(pairs), "before": pairs.before.mean(),
                            "after": pairs.after.mean(), "difference": difference, "low": low, "high": high})
    return pd.DataFrame(out)


def mixture_table(pack: str | Path) -> pd.DataFrame:
    """A row a source of the packed shards: tokens, share, the share asked for, epochs (mean over shards). Empty if none."""
    shards = pd.DataFrame(read_rows(Path(pack) / "shards.jsonl"))
    if shards.empty:
        return pd.DataFrame(columns=["source", "tokens", "share", "asked", "epochs"])
    recipe = yaml.safe_load((Path(pack) / "recipe.yaml").read_text())
    chain = recipe["pretrain"]["cot_token_fraction"]
    weights = {f"{source['at']} ({source['language']})": source["weight"] for source in recipe["corpus"]["sources"]}
    asked = {name: (1 - chain) * weight / sum(weights.values()) for name, weight in weights.items()} | {"cot": chain}
    tokens, epochs = pd.DataFrame(list(shards.tokens)).sum(), pd.DataFrame(list(shards.epochs)).mean()
    return pd.DataFrame({"source": tokens.index, "tokens": tokens.astype(int), "share": tokens / tokens.sum(),
                         "asked": tokens.index.map(asked), "epochs": tokens.index.map(epochs)}).reset_index(drop=True)


def padding(pack: str | Path) -> float:
    """Share of the packed sequences that holds no token; NaN if nothing was packed."""
    rows = read_rows(Path(pack) / "shards.jsonl")
    return float(np.average([r["padding"] for r in rows], weights=[r["sequences"] for r in rows])) if rows else np.nan


def quarters(table: pd.DataFrame, columns=REWARDS) -> pd.DataFrame:
    """Mean over the first and the last quarter of the steps, per arm and seed."""
    out = []
    for (arm, seed), rows in table.groupby(["arm", "seed"], sort=True):
        size = max(1, len(rows) // 4)
        ordered = rows.sort_values("step")
        for column in (c for c in columns if ordered.get(c) is not None and ordered[c].notna().any()):
            out.append({"arm": arm, "seed": seed, "quantity": column, "first quarter": ordered[column][:size].mean(),
                        "last quarter": ordered[column][-size:].mean(), "steps": len(rows)})
    return pd.DataFrame(out)
