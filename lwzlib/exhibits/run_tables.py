"""Run folders as tables: a row per RL step, per held-out sample, per source of the pretraining tokens; and their export."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from lwzlib.base.provenance import commit_of
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import DataError, read_rows, read_yaml
from lwzlib.base.run_folder import status_of
from lwzlib.evaluate.intervals import bootstrap_mean

REWARDS = ("length", "writing", "format")
METRICS = (*REWARDS, "think_words", "answer_words", "think_tokens", "answer_tokens", "completion_tokens",
           "answer_words_not_truncated", "truncated", "groups_without_variance", "entropy", "loss", "step_s")
_TEXTS = ["type", "query", "word_range", "completion"]  # columns of a held-out sample that stay in the run folder


def made_by(stage: Path) -> dict:
    """Provenance of an arm's stage: model, arm, seed, fingerprint, commit, hardware, versions."""
    provenance, status = (json.loads((stage / f"{name}.json").read_text()) for name in ("provenance", "status"))
    recipe = read_yaml(stage / "recipe.yaml")
    return {"model": recipe["model"]["name"], "arm": stage.parent.name, "seed": recipe["seed"],
            "fingerprint": status["fingerprint"], "commit": commit_of(provenance), "hardware": provenance["hardware"],
            "versions": " ".join(f"{name} {version}" for name, version in provenance["versions"].items())}


def run_table(folder: str | Path) -> pd.DataFrame:
    """GRPO rows of every arm in a run folder, each with its provenance. Empty if there are none."""
    tables = []
    for grpo in sorted(Path(folder).glob("*/grpo")):
        rows = pd.DataFrame(read_rows(grpo / "metrics.jsonl"))
        if len(rows):
            origin, kept = made_by(grpo), rows[["step", *(name for name in METRICS if name in rows)]]
            tables.append(kept.assign(**origin)[[*origin, *kept.columns]])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["arm", "seed", "step"])


def held_out_table(folder: str | Path, during: bool = False) -> pd.DataFrame:
    """Held-out samples of every arm in a run folder, a row each: provenance, judge (the Writing RM's identity), algorithm,
    start, phase (before, after; `during` RL too), step (of RL), id, rewards, lengths, texts. The paper's arms come first. Empty
    if there are none."""
    rows, order = [], list(load_recipe("paper").arms)
    arms = {path.parent.name for path in Path(folder).glob("*/samples-*")}
    for arm in sorted(arms, key=lambda arm: (order.index(arm) if arm in order else len(order), arm)):
        for phase in ("before", *["during"] * during, "after"):
            rows += _phase_rows(Path(folder), arm, phase)
    return pd.DataFrame(rows, columns=None if rows else ["arm", "algorithm", "start", "seed", "phase", "step", "id"])


def _phase_rows(folder: Path, arm: str, phase: str) -> list[dict]:
    stage = folder / arm / f"samples-{phase}"
    paths = sorted(stage.glob("samples*.jsonl"), key=lambda path: (len(path.stem), path.stem))
    if not paths:
        return []
    recipe, rows = read_yaml(stage / "recipe.yaml"), []
    algorithm, start = (recipe["inputs"].get(name, old) for name, old in (("algorithm", "grpo"), ("start", "base")))
    origin = made_by(stage) | {"judge": judge_of(folder, recipe, arm), "algorithm": algorithm, "start": start, "phase": phase}
    for path in paths:
        step = {"before": 0, "during": path.stem.rpartition("_")[2], "after": recipe.get("grpo", {}).get("steps")}[phase]
        rl_step = {"step": int(step) if algorithm == "grpo" else None}
        rows += [origin | row | rl_step for row in read_rows(path)]
    return rows


def judge_of(folder: str | Path, recipe: dict, arm: str) -> str:
    """Identity of the Writing RM that scored an arm's samples, by the recipe of that stage; "" where none did."""
    reward = recipe.get("reward", {})
    name = reward.get("writing", {}).get("model", "") if reward.get("weights", {}).get("writing") else ""
    folders = [Path(folder) / arm / "writing-rm", Path(folder) / "writing-rm"]
    for model in [place / "model" for place in folders] if name == "stage" else [Path(name)]:
        if name and (model / "writing_rm.json").is_file():
            return json.loads((model / "writing_rm.json").read_text())["identity"]
    return ""


def held_out_changes(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of each reward before and after in a held-out table, and their difference over the queries that have both, with its
    95% interval. A row per arm and reward."""
    rows = []
    for reward in (name for name in REWARDS if name in table):
        for arm, samples in table.groupby("arm", sort=False):
            pairs = samples.pivot(index="id", columns="phase", values=reward).reindex(columns=["before", "after"]).dropna()
            if len(pairs):
                difference, low, high = bootstrap_mean(pairs.after - pairs.before)
                rows.append({"arm": arm, "reward": reward, "queries": len(pairs), "before": pairs.before.mean(),
                             "after": pairs.after.mean(), "difference": difference, "low": low, "high": high})
    return pd.DataFrame(rows)


def quarter(rows: pd.DataFrame, number: int) -> pd.DataFrame:
    """Rows of the first (1) to the last (4) quarter of the RL steps, with their place in it. Quarters are equally long; where
    the steps cannot be cut in four, the middle is left out."""
    size = max(1, len(rows) // 4)
    start = len(rows) - size * (5 - number) if number > 2 else size * (number - 1)
    return rows.sort_values("step").iloc[start : start + size].assign(place=range(size))


def quarter_means(table: pd.DataFrame, columns=REWARDS) -> pd.DataFrame:
    """Means over the first and the last quarter of the steps, per arm and seed."""
    means = []
    for (arm, seed), rows in table.groupby(["arm", "seed"], sort=True):
        for column in (name for name in columns if name in rows and rows[name].notna().any()):
            means.append({"arm": arm, "seed": seed, "quantity": column, "first quarter": quarter(rows, 1)[column].mean(),
                          "last quarter": quarter(rows, 4)[column].mean(), "steps": len(rows)})
    return pd.DataFrame(means)


def mixture_table(pack: str | Path) -> pd.DataFrame:
    """Tokens, share, share asked for, and epochs (mean over shards) of each source in the packed shards. Empty if none."""
    shards = pd.DataFrame(read_rows(Path(pack) / "shards.jsonl"))
    if shards.empty:
        return pd.DataFrame(columns=["source", "tokens", "share", "asked", "epochs"])
    recipe = read_yaml(Path(pack) / "recipe.yaml")
    cot_share = recipe["pretrain"]["cot_token_fraction"]
    weights = {f"{source['at']} ({source['language']})": source["weight"] for source in recipe["corpus"]["sources"]}
    wanted = {name: (1 - cot_share) * weight / sum(weights.values()) for name, weight in weights.items()} | {"cot": cot_share}
    tokens, epochs = pd.DataFrame(list(shards.tokens)).sum(), pd.DataFrame(list(shards.epochs)).mean()
    return pd.DataFrame({"source": tokens.index, "tokens": tokens.astype(int), "share": tokens / tokens.sum(),
                         "asked": tokens.index.map(wanted), "epochs": tokens.index.map(epochs)}).reset_index(drop=True)


def padding_share(pack: str | Path) -> float:
    """Share of the packed sequences that holds no token; NaN if nothing was packed."""
    rows = read_rows(Path(pack) / "shards.jsonl")
    return float(np.average([r["padding"] for r in rows], weights=[r["sequences"] for r in rows])) if rows else np.nan


def mixture_rows(folder: Path) -> pd.DataFrame:
    """Mixture of a run folder's `pack`, in the committed form; empty if nothing was packed."""
    table = mixture_table(Path(folder) / "pack")
    if table.empty:
        return table
    origin = made_by(Path(folder) / "pack") | {"arm": "continual-pretrain"}
    return table.assign(**origin)[[*origin, *table.columns]]


def export(folders: list[Path], to: Path) -> dict[Path, int]:
    """Write the rows of finished runs with their provenance, as tables that `results.read_tables` reads: those of RL to `to`,
    those of the held-out samples and of the mixture beside it. Returns {file: rows}. Raises DataError for a name, a run or rows
    that `lwz figures` would refuse."""
    if to.suffix != ".csv" or to.stem.endswith(("_held_out", "_mixture")):
        raise DataError(f"--to {to} must end in .csv, and not in _held_out.csv or _mixture.csv, which `lwz figures` reads as "
                        "other tables")
    for folder in folders:
        _check_finished(folder)
    steps = pd.concat([run_table(folder) for folder in folders], ignore_index=True)
    if steps.empty:
        raise DataError(f"no GRPO rows in {', '.join(map(str, folders))}")
    if steps.commit.isna().any():
        raise DataError("these runs know no commit, and `lwz figures` refuses rows without one: run the kit from a git clone")
    if (twice := steps[steps.duplicated(["arm", "seed", "step"])]).size:
        raise DataError(f"arm {twice.arm.iloc[0]}, seed {twice.seed.iloc[0]} is in two of these runs, and a table holds one: "
                        "export them one by one, each --to a file of its own")
    samples = pd.concat([held_out_table(folder, during=True) for folder in folders], ignore_index=True)
    samples = samples.drop(columns=_TEXTS, errors="ignore").astype({"step": "Int64"})
    mixture = pd.concat([mixture_rows(folder) for folder in folders], ignore_index=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    written = {}
    for kind, rows in (("", steps), ("_held_out", samples), ("_mixture", mixture)):
        path = to.with_stem(f"{to.stem}{kind}")
        if rows.empty:
            path.unlink(missing_ok=True)  # these runs have none where others had
        else:
            rows.round(4).to_csv(path, index=False)
            written[path] = len(rows)
    return written


def _check_finished(folder: Path) -> None:
    for path in sorted(Path(folder).glob("**/status.json")):
        status, (*arm, stage) = status_of(path.parent), path.parent.relative_to(folder).parts
        if status.get("state") != "finished":
            at = f", at step {status['step']} of {status['total']}" if status.get("total") else ""
            raise DataError(f"{folder}: {stage} of {'/'.join(arm) or 'all arms'} is {status.get('state')}{at}; `lwz run` goes "
                            "on with it; remove its folder if the recipe asks for it no more")
