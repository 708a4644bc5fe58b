"""Run folders as tables: a row per RL step, per held-out sample, per source of the pretraining tokens; and their export."""

from pathlib import Path

import numpy as np
import pandas as pd

from lwzlib.base.provenance import commit_of
from lwzlib.base.recipe import flatten, load_recipe
from lwzlib.base.rows import DataError, read_json, read_rows, read_yaml
from lwzlib.base.run_folder import provenance_of, status_of
from lwzlib.evaluate.intervals import bootstrap_mean, t_interval

REWARDS = ("length", "writing", "format", "overlong")
METRICS = (*REWARDS, "think_words", "answer_words", "think_tokens", "answer_tokens", "completion_tokens",
           "answer_words_not_truncated", "truncated", "groups_without_variance", "entropy", "loss", "step_s")
_TEXTS = ["type", "query", "word_range", "completion"]  # columns of a held-out sample that stay in the run folder


def made_by(stage: Path) -> dict:
    """Provenance of an arm's stage: model, arm, seed, fingerprint, commit, hardware, versions; `shared`: what it has in common
    with the runs of other seeds, where it has."""
    provenance, status = provenance_of(stage), status_of(stage)
    recipe = read_yaml(stage / "recipe.yaml")
    own = {name.replace("_", "-"): f"seed {asked['seed']}" for name, asked in recipe.items()
           if isinstance(asked, dict) and asked.get("seed") is not None}  # cold_start.seed, writing_rm.seed
    shared = ", ".join(f"{name} of {seed}" for name, seed in (own | recipe["inputs"].get("shared", {})).items())
    return {"model": recipe["model"]["name"], "arm": stage.parent.name, "seed": recipe["seed"],
            "fingerprint": status.get("fingerprint", ""), "commit": commit_of(provenance), "hardware": provenance["hardware"],
            "versions": " ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
            **({"shared": shared} if shared else {})}


def stage_quantities(stages: list[Path]) -> dict[str, list]:
    """{quantity: its values} of the recipes of stages: more than one value where an arm has its own."""
    quantities: dict[str, list] = {}
    for path in stages:
        content = read_yaml(path)
        content.pop("inputs")
        for name, value in flatten(content).items():
            values = quantities.setdefault(name, [])
            values += [value] if value not in values else []
    return quantities


def departures_of(quantities: dict[str, list]) -> list[tuple[str, object, list]]:
    """(quantity, value in `paper`, values here) of each of `stage_quantities` that departs from the paper."""
    paper = flatten(load_recipe("paper").model_dump(mode="json"))
    return [(name, paper[name], values) for name, values in quantities.items() if name in paper and values != [paper[name]]]


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
    start, phase (before, after; `during` RL too), step (of RL), id, rewards, lengths, `asked_words` (the middle of the range),
    texts. The paper's arms come first. Empty if there are none."""
    rows, order = [], list(load_recipe("paper").arms)
    arms = {path.parent.name for path in Path(folder).glob("*/samples-*")}
    for arm in sorted(arms, key=lambda arm: (order.index(arm) if arm in order else len(order), arm)):
        for phase in ("before", *["during"] * during, "after"):
            rows += _phase_rows(Path(folder), arm, phase)
    return pd.DataFrame(rows, columns=None if rows else ["arm", "algorithm", "start", "seed", "phase", "step", "id"])


def _phase_rows(folder: Path, arm: str, phase: str) -> list[dict]:
    stage = folder / arm / f"samples-{phase}"
    paths = sorted(stage.glob("samples*.jsonl"), key=lambda path: (len(path.stem), path.stem))
    if not paths or not (stage / "recipe.yaml").is_file():  # not begun
        return []
    recipe, rows = read_yaml(stage / "recipe.yaml"), []
    algorithm, start = (recipe["inputs"].get(name, old) for name, old in (("algorithm", "grpo"), ("start", "base")))
    origin = made_by(stage) | {
        "judge": judge_identity(folder, recipe, arm), "algorithm": algorithm, "start": start, "phase": phase}
    for path in paths:
        step = {"before": 0, "during": path.stem.rpartition("_")[2], "after": recipe.get("grpo", {}).get("steps")}[phase]
        rl_step = {"step": int(step) if algorithm == "grpo" else None}
        rows += [origin | row | rl_step | {"asked_words": sum(row["word_range"]) / 2}
                 for row in read_rows(path)]
    return rows


def judge_identity(folder: str | Path, recipe: dict, arm: str) -> str:
    """Identity of the judge (of a Writing RM, its own) that scored an arm's samples, by the recipe of that stage; or ""."""
    reward = recipe.get("reward", {})
    writing = reward.get("writing", {})
    name = writing.get("model", "") if reward.get("weights", {}).get("writing") else ""
    if name and writing.get("judge", "reward-model") != "reward-model":
        return f"{name}, {writing['judge']}, {writing['prompts']}"
    places = (Path(folder) / arm, Path(folder))
    own, measured = [place / "writing-rm" / "model" for place in places], [place / "judge" for place in places]
    for model in own if name == "stage" else [Path(name), *measured]:
        if name and (model / "writing_rm.json").is_file():
            return read_json(model / "writing_rm.json")["identity"]
    return ""


def before_and_after(samples: pd.DataFrame, reward: str) -> pd.DataFrame:
    """Columns before and after of one arm's reward, by the id of each query that has both."""
    return samples.pivot(index="id", columns="phase", values=reward).reindex(columns=["before", "after"]).dropna()


def held_out_changes(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of each reward before and after in a held-out table, and their difference over the queries that have both, with its
    95% interval. A row per arm and reward."""
    rows = []
    for reward in (name for name in REWARDS if name in table):
        for arm, samples in table.groupby("arm", sort=False):
            if len(pairs := before_and_after(samples, reward)):
                difference, low, high = bootstrap_mean(pairs.after - pairs.before)
                rows.append({"arm": arm, "reward": reward, "queries": len(pairs), "before": pairs.before.mean(),
                             "after": pairs.after.mean(), "difference": difference, "low": low, "high": high})
    return pd.DataFrame(rows)


def seed_table(samples: pd.DataFrame) -> pd.DataFrame:
    """Held-out rewards over the seeds of held-out tables: of the seeds' means before and after, and of their change, the mean
    and its 95% interval by Student's t, `_low` and `_high` (NaN for one seed). A row per arm and reward, with the seeds that
    have both phases, what they share, and the commits that made them. Empty without such seeds."""
    changes = [held_out_changes(table).assign(seed=seed) for seed, table in samples.groupby("seed")] if len(samples) else []
    changes = [rows for rows in changes if len(rows)]
    if not changes:
        return pd.DataFrame()
    rows = []
    for (arm, reward), of_seeds in pd.concat(changes).rename(columns={"difference": "change"}).groupby(
            ["arm", "reward"], sort=False):
        row = {"arm": arm, "reward": reward, "seeds": " ".join(map(str, of_seeds.seed))}
        for name in ("before", "after", "change"):
            low, high = t_interval(of_seeds[name])
            row |= {name: of_seeds[name].mean(), f"{name}_low": low, f"{name}_high": high}
        made = samples[(samples.arm == arm) & samples.seed.isin(of_seeds.seed)].reindex(columns=["shared", "commit"])
        rows.append(row | {name: ", ".join(sorted(set(made[name].dropna()))) for name in made})
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
        if status.get("state") != "finished" and arm != ["judges"]:  # those of `lwz judge-quality` are no part of a run
            at = f", at step {status['step']} of {status['total']}" if status.get("total") else ""
            raise DataError(f"{folder}: {stage} of {'/'.join(arm) or 'all arms'} is {status.get('state')}{at}; `lwz run` goes "
                            "on with it; remove its folder if the recipe asks for it no more")
