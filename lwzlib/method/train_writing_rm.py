"""Train the Writing RM, a Bradley-Terry reward model on preference pairs, and measure what it is worth.

Published: loss -E log sigmoid(r_chosen - r_rejected) on Qwen2.5-72B, human preference pairs on writing. Not published:
the pairs, their number, how good the model is. So every model trained here, by TRL's RewardTrainer, states its accuracy per
kind of pair with an interval, its calibration, and what else its score follows: length, markdown, language.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import binomtest, spearmanr
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from lwzlib.base import models, trainers
from lwzlib.base.processes import main_process
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, write_atomic, write_rows
from lwzlib.base.run_folder import Run
from lwzlib.method.pairs import Pair, balance_lengths, data_card, load_pairs, split_by_source
from lwzlib.method.text import count_words
from lwzlib.method.writing_rm import score_ids, token_ids

PairMaker = Callable[[Recipe, Run], dict[str, list[Pair]]]  # called where writing_rm.pairs is `made`
_MARKDOWN_EVERY = 4  # of so many held-out pairs one is also scored with markdown


def pairs_of_run(recipe: Recipe, run: Run, maker: PairMaker) -> dict[str, list[Pair]]:
    """{train, heldout}: read from where the recipe says, or made by `maker`; kept in the run's folder, so made once."""
    settings, files = recipe.writing_rm, {part: run.folder / f"pairs_{part}.jsonl" for part in ("train", "heldout")}
    if not all(file.exists() for file in files.values()):
        if settings.pairs == "made":
            parts = maker(recipe, run)
        else:
            split = split_by_source(load_pairs(settings.pairs), settings.heldout_share, run.seed)
            parts = dict(zip(files, split, strict=True))
        if settings.length_balanced:
            parts["train"] = balance_lengths(parts["train"], run.seed)
        if empty := [part for part, pairs in parts.items() if not pairs]:
            raise RunError(f"no {empty[0]} pairs are left; give more sources, another writing_rm.heldout_share, or "
                           "writing_rm.length_balanced=false")
        data_card(parts).to_csv(run.folder / "card.csv", index=False)
        for part, file in files.items():
            write_rows(file, [pair.model_dump() for pair in parts[part]])
    return {part: load_pairs(str(file)) for part, file in files.items()}


def train_rm(recipe: Recipe, run: Run, maker: PairMaker) -> Path:
    """Train on the pairs; returns the folder of the model. Leaves the pairs, `card.csv`, `scores.jsonl` (one row per held-out
    pair) and `quality.json`; resumes from the last whole checkpoint."""
    if run.finished:
        return run.folder / "model"
    settings, m = recipe.writing_rm, recipe.model
    with run.work():
        last = trainers.last_checkpoint(run, "metrics")
        config = RewardConfig(
            num_train_epochs=settings.epochs, learning_rate=settings.learning_rate, lr_scheduler_type="cosine", warmup_steps=4,
            per_device_train_batch_size=settings.batch_pairs, max_length=None,
            **trainers.trainer_arguments(recipe, run, settings.checkpoint_every_steps))
        with config.main_process_first(local=False), models.unsharded():
            parts = pairs_of_run(recipe, run, maker)
        set_seed(run.seed)  # the head is new
        model, tokenizer = models.load_model(settings.model, m.dtype, m.attention, m.trust_remote_code, scorer=True)
        rows = []
        for pair in parts["train"]:
            texts = [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]
            chosen_ids, rejected_ids = token_ids(tokenizer, m.frame, settings.fold_layout, texts)
            if max(len(chosen_ids), len(rejected_ids)) <= settings.max_tokens:
                rows.append({"chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
        pairs = len(parts["train"])
        run.update(pairs=pairs, pairs_too_long=pairs - len(rows))
        if not rows:
            raise RunError(f"all {pairs} training pairs are longer than writing_rm.max_tokens = {settings.max_tokens}")
        lora = trainers.lora_config(settings.lora, task_type="SEQ_CLS", modules_to_save=["score"])
        trainer = RewardTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                                peft_config=lora, callbacks=[trainers.Rows(run, trainers.RM_COLUMNS)])
        trained = trainers.train_to_end(trainer, last).eval()
        measured = evaluate_rm(recipe, run, trained, tokenizer, parts["heldout"])
        info = {"identity": run.fingerprint, "frame": m.frame, "fold_layout": settings.fold_layout,
                "max_tokens": settings.max_tokens, "floor": measured["floor"]}
        trainers.save_trained(trained, trainer, run, {"writing_rm.json": info})
    return run.folder / "model"


def evaluate_rm(recipe: Recipe, run: Run, model, tokenizer, heldout: list[Pair]) -> dict:
    """Score held-out pairs and leave `scores.jsonl` and `quality.json` (see `quality`)."""
    texts = [(pair.prompt, pair.chosen) for pair in heldout] + [(pair.prompt, pair.rejected) for pair in heldout]
    texts += [(pair.prompt, markdown(pair.chosen)) for pair in heldout[::_MARKDOWN_EVERY]]
    ids = token_ids(tokenizer, recipe.model.frame, recipe.writing_rm.fold_layout, texts)
    max_tokens = recipe.writing_rm.max_tokens
    cut = sum(len(text) > max_tokens for text in ids)
    if main_process():
        print(f"writing-rm: {cut} of {len(ids)} held-out texts are cut, longer than writing_rm.max_tokens = {max_tokens}")
    scores = score_ids(model, tokenizer.pad_token_id, [text[-max_tokens:] for text in ids], 8192)
    n = len(heldout)
    rows = [{"kind": pair.kind, "source": pair.source, "language": pair.language, "chosen": chosen, "rejected": rejected,
             "chosen_words": count_words(pair.chosen), "rejected_words": count_words(pair.rejected)}
            for pair, chosen, rejected in zip(heldout, scores[:n], scores[n : 2 * n], strict=True)]
    for row, score in zip(rows[::_MARKDOWN_EVERY], scores[2 * n :], strict=True):
        row["markdown"] = score
    run.write("scores", rows)
    measured = quality(rows)
    if main_process():
        write_atomic(run.folder / "quality.json", json.dumps(measured, indent=1))
    return measured


def markdown(text: str) -> str:
    """The text with a bullet and a bold first word on each line: the same words, so a score should not move."""
    words = [line.partition(" ") for line in text.split("\n") if line]
    return "\n".join(f"- **{first}** {rest}" for first, _, rest in words)


def quality(rows: list[dict]) -> dict:
    """Quality of a Writing RM on held-out pairs: `accuracy` {kind or all: [share, low, high, pairs]} with Wilson's 95%
    interval, mean `margin`, `calibration` [[expected, observed win rate, pairs]] in fifths by expectation, and its gap,
    Spearman's correlation of score and words over the preferred texts, mean shift by markdown in standard deviations,
    `languages` {language: mean score}, and `floor`, the lowest score seen: that of an empty answer."""
    def accuracy(pairs: pd.DataFrame) -> list:
        wins = int((pairs.chosen > pairs.rejected).sum())
        interval = binomtest(wins, len(pairs)).proportion_ci(method="wilson")
        return [wins / len(pairs), interval.low, interval.high, len(pairs)]

    def win_rates(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return np.where(ours == theirs, 0.5, ours > theirs)

    table = pd.DataFrame(rows)
    chosen, rejected, chosen_words, rejected_words = (
        table[name].to_numpy() for name in ("chosen", "rejected", "chosen_words", "rejected_words"))
    expected, observed = 1 / (1 + np.exp(-np.abs(chosen - rejected))), win_rates(chosen, rejected)
    fifths = [part for part in np.array_split(np.argsort(expected), 5) if len(part)]
    calibration = [[float(expected[part].mean()), float(observed[part].mean()), len(part)] for part in fifths]
    shifts = [row["markdown"] - row["chosen"] for row in rows if "markdown" in row]
    by_language = {language: pairs.chosen.to_numpy() for language, pairs in table.groupby("language")}
    return {
        "accuracy": {kind: accuracy(pairs) for kind, pairs in table.groupby("kind", sort=False)} | {"all": accuracy(table)},
        "margin": float((chosen - rejected).mean()),
        "calibration": calibration,
        "calibration_gap": float(sum(abs(e - o) * n for e, o, n in calibration) / len(rows)),
        "length_correlation": _finite(spearmanr(chosen, chosen_words).statistic),
        "length_alone": float(win_rates(chosen_words, rejected_words).mean()),
        "markdown_shift": _finite(np.mean(shifts) / max(np.concatenate([chosen, rejected]).std(), 1e-9)),
        "languages": {language: float(scores.mean()) for language, scores in by_language.items()},
        "floor": float(min(chosen.min(), rejected.min())),
    }


def _finite(value) -> float | None:
    """The value, or None (JSON's null) where it cannot be computed: JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
