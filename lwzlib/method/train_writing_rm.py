"""The Writing RM: a Bradley-Terry reward model on preference pairs, trained by TRL's RewardTrainer.

Published: loss -E log sigmoid(r_chosen - r_rejected) on Qwen2.5-72B, human preference pairs on writing. Not published:
the pairs, their number, how good the model is. So every model trained here states its accuracy per kind of pair with an
interval, its calibration, and what else its score follows: length, markdown, language.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lwzlib.base.processes import main_process
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, write_atomic, write_rows
from lwzlib.base.run_folder import Run
from lwzlib.method.pairs import Pair, balance_lengths, data_card, load_pairs, split_by_source
from lwzlib.method.text import count_words
from lwzlib.method.writing_rm import score_ids, token_ids

MakePairs = Callable[[Recipe, Run], dict[str, list[Pair]]]  # where writing_rm.pairs is `made`
_EVERY = 4  # so many held-out pairs for one that is also scored with markdown


def make_pairs(recipe: Recipe, run: Run, made_pairs: MakePairs) -> dict[str, list[Pair]]:
    """{train, heldout}: read from where the recipe says, or by `made_pairs`; kept in the run's folder, so made once."""
    asked, files = recipe.writing_rm, {part: run.folder / f"pairs_{part}.jsonl" for part in ("train", "heldout")}
    if not all(file.exists() for file in files.values()):
        if asked.pairs == "made":
            made = made_pairs(recipe, run)
        else:
            made = dict(zip(files, split_by_source(load_pairs(asked.pairs), asked.heldout_share, run.seed), strict=True))
        if asked.length_balanced:
            made["train"] = balance_lengths(made["train"], run.seed)
        if empty := [part for part, some in made.items() if not some]:
            raise RunError(f"no {empty[0]} pairs are left; give more sources, another writing_rm.heldout_share, or "
                           "writing_rm.length_balanced=false")
        data_card(made).to_csv(run.folder / "card.csv", index=False)
        for part, file in files.items():
            write_rows(file, [pair.model_dump() for pair in made[part]])
    return {part: load_pairs(str(file)) for part, file in files.items()}


def train_rm(recipe: Recipe, run: Run, made_pairs: MakePairs) -> Path:
    """The folder of the trained model. Leaves the pairs, `card.csv`, `scores.jsonl` (each held-out pair) and
    `quality.json`; resumes from the last whole checkpoint."""
    if run.finished:
        return run.folder / "model"
    from datasets import Dataset
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    from lwzlib.base import trainers
    from lwzlib.base.models import load_model, unsharded

    asked = recipe.writing_rm
    with run.work():
        last = trainers.last_checkpoint(run, "metrics")
        config = RewardConfig(
            num_train_epochs=asked.epochs, learning_rate=asked.learning_rate, lr_scheduler_type="cosine", warmup_steps=4,
            per_device_train_batch_size=asked.batch_pairs, max_length=None,
            **trainers.checkpoint_arguments(asked.checkpoint_every_steps), **trainers.trainer_arguments(recipe, run))
        with config.main_process_first(local=False), unsharded():
            parts = make_pairs(recipe, run, made_pairs)
        m = recipe.model
        set_seed(run.seed)  # the head is new
        model, tokenizer = load_model(asked.model, m.dtype, m.attention, m.trust_remote_code, scorer=True)
        rows = [dict(zip(("chosen_ids", "rejected_ids"),
                         token_ids(tokenizer, m.frame, asked.fold_layout, [(p.prompt, p.chosen), (p.prompt, p.rejected)]),
                         strict=True))
                for p in parts["train"]]
        fits = [row for row in rows if max(map(len, row.values())) <= asked.max_tokens]
        run.update(pairs=len(rows), pairs_too_long=len(rows) - len(fits))
        if not fits:
            raise RunError(f"all {len(rows)} training pairs are longer than writing_rm.max_tokens = {asked.max_tokens}")
        lora = trainers.lora_config(asked.lora, task_type="SEQ_CLS", modules_to_save=["score"])
        trainer = RewardTrainer(model, args=config, train_dataset=Dataset.from_list(fits), processing_class=tokenizer,
                                peft_config=lora, callbacks=[trainers.Rows(run, trainers.RM_COLUMNS)])
        trained = trainers.train_to_end(trainer, last).eval()
        quality = evaluate_rm(recipe, run, trained, tokenizer, parts["heldout"])
        trainers.save_trained(trained, trainer, run, {"writing_rm.json": {
            "identity": run.fingerprint, "frame": m.frame, "fold_layout": asked.fold_layout, "max_tokens": asked.max_tokens,
            "floor": quality["floor"]}})
    return run.folder / "model"


def evaluate_rm(recipe: Recipe, run: Run, model, tokenizer, heldout: list[Pair]) -> dict:
    """Score held-out pairs and leave `scores.jsonl` and `quality.json` (see `quality`)."""
    marked = heldout[::_EVERY]
    asked = [(p.prompt, p.chosen) for p in heldout] + [(p.prompt, p.rejected) for p in heldout]
    asked += [(p.prompt, markdown(p.chosen)) for p in marked]
    ids = token_ids(tokenizer, recipe.model.frame, recipe.writing_rm.fold_layout, asked)
    values = score_ids(model, tokenizer.pad_token_id, [each[-recipe.writing_rm.max_tokens :] for each in ids], 8192)
    n = len(heldout)
    rows = [{"kind": p.kind, "source": p.source, "language": p.language, "chosen": a, "rejected": b,
             "chosen_words": count_words(p.chosen), "rejected_words": count_words(p.rejected)}
            for p, a, b in zip(heldout, values[:n], values[n : 2 * n], strict=True)]
    for row, value in zip(rows[::_EVERY], values[2 * n :], strict=True):
        row["markdown"] = value
    run.write("scores", rows)
    found = quality(rows)
    if main_process():
        write_atomic(run.folder / "quality.json", json.dumps(found, indent=1))
    return found


def markdown(text: str) -> str:
    """The same words with a heading's and a list's marks: a score should not move."""
    return "\n".join(f"- **{first}** {rest}" for first, _, rest in (s.partition(" ") for s in text.split("\n") if s))


def quality(rows: list[dict]) -> dict:
    """What held-out pairs say of a Writing RM: `accuracy` {kind or all: [share, low, high, pairs]} with Wilson's 95%
    interval, mean `margin`, `calibration` [[expected, observed win rate, pairs]] in fifths by expectation, and its gap,
    Spearman's correlation of score and words over the preferred texts, mean shift by markdown in standard deviations,
    `languages` {language: mean score}, and `floor`, the lowest score seen: that of an empty answer."""
    from scipy.stats import binomtest, spearmanr

    def share(some):
        wins = sum(row["chosen"] > row["rejected"] for row in some)
        interval = binomtest(wins, len(some)).proportion_ci(method="wilson")
        return [wins / len(some), interval.low, interval.high, len(some)]

    chosen, rejected = (np.array([row[name] for row in rows]) for name in ("chosen", "rejected"))
    moved = [row["markdown"] - row["chosen"] for row in rows if "markdown" in row]
    expected = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    observed = np.where(chosen == rejected, 0.5, chosen > rejected)
    fifths = [part for part in np.array_split(np.argsort(expected), 5) if len(part)]
    calibration = [[float(expected[part].mean()), float(observed[part].mean()), len(part)] for part in fifths]
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {
        "accuracy": {kind: share([r for r in rows if r["kind"] == kind]) for kind in kinds} | {"all": share(rows)},
        "margin": float((chosen - rejected).mean()),
        "calibration": calibration,
        "calibration_gap": float(sum(abs(e - o) * n for e, o, n in calibration) / len(rows)),
        "length_correlation": _finite(spearmanr(chosen, [row["chosen_words"] for row in rows]).statistic),
        "length_alone": float(np.mean([0.5 * (r["chosen_words"] == r["rejected_words"])
                                       + (r["chosen_words"] > r["rejected_words"]) for r in rows])),
        "markdown_shift": _finite(np.mean(moved) / max(np.concatenate([chosen, rejected]).std(), 1e-9)),
        "languages": {name: float(np.mean([r["chosen"] for r in rows if r["language"] == name]))
                      for name in sorted({r["language"] for r in rows})},
        "floor": float(min(chosen.min(), rejected.min())),
    }


def _finite(value) -> float | None:
    """JSON has no NaN: what cannot be computed is null."""
    return float(value) if np.isfinite(value) else None
