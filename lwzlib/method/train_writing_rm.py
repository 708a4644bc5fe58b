"""Train the Writing RM, a Bradley-Terry reward model on preference pairs, and measure what it is worth.

Published: loss -E log sigmoid(r_chosen - r_rejected) on Qwen2.5-72B, human preference pairs on writing. Not published:
the pairs, their number, how good the model is. So every model trained here, by TRL's RewardTrainer, states its accuracy per
kind of pair with an interval, its calibration, and what else its score follows: length, markdown, language.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import norm, spearmanr
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from lwzlib.base import trainers
from lwzlib.base.processes import main_process
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, write_atomic
from lwzlib.base.run_folder import Run
from lwzlib.base.scoring import scores_together
from lwzlib.method.pairs import PAIR_FILES, Pair, load_pairs
from lwzlib.method.text import count_words
from lwzlib.method.writing_rm import token_ids

_MARKDOWN_EVERY = 4  # of so many held-out pairs one is also scored with markdown


def train_rm(recipe: Recipe, run: Run, pairs: Path) -> Path:
    """Train on the folder of pairs that the stage `pairs` left; returns the folder of the model. Leaves `scores.jsonl` (one row
    per held-out pair) and `quality.json`; resumes from the last whole checkpoint."""
    if run.finished:
        return run.folder / "model"
    settings, frame = recipe.writing_rm, recipe.model.frame
    with run.work():
        last = trainers.last_checkpoint(run, "metrics")
        config = RewardConfig(
            num_train_epochs=settings.epochs, learning_rate=settings.learning_rate, lr_scheduler_type="cosine", warmup_steps=4,
            per_device_train_batch_size=settings.batch_pairs, max_length=None,
            **trainers.trainer_arguments(recipe, run, settings.checkpoint_every_steps, settings.lora))
        train, heldout = (load_pairs(str(pairs / file)) for file in PAIR_FILES)
        set_seed(run.seed)  # the head is new
        model, tokenizer = trainers.load_trainee(recipe, settings.model, settings.lora, scorer=True)
        rows = []
        for pair in train:
            texts = [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]
            chosen_ids, rejected_ids = token_ids(tokenizer, frame, settings.fold_layout, texts)
            if max(len(chosen_ids), len(rejected_ids)) <= settings.max_tokens:
                rows.append({"chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
        run.update(pairs=len(train), pairs_too_long=len(train) - len(rows))
        if not rows:
            raise RunError(f"all {len(train)} training pairs are longer than writing_rm.max_tokens = {settings.max_tokens}")
        lora = trainers.lora_config(settings.lora, task_type="SEQ_CLS", modules_to_save=["score"])
        trainer = RewardTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                                peft_config=lora, callbacks=[trainers.Rows(run, trainers.RM_COLUMNS)])
        trained = trainers.train_to_end(trainer, last).eval()
        measured = evaluate_rm(recipe, run, trained, tokenizer, heldout)
        info = {"identity": run.fingerprint, "frame": frame, "fold_layout": settings.fold_layout,
                "max_tokens": settings.max_tokens, "floor": measured["floor"]}
        trainers.save_trained(trained, trainer, run, {"writing_rm.json": info})
    return run.folder / "model"


def evaluate_rm(recipe: Recipe, run: Run, model, tokenizer, heldout: list[Pair]) -> dict:
    """Score held-out pairs by a model in memory, as `judge_heldout`."""
    ids = token_ids(tokenizer, recipe.model.frame, recipe.writing_rm.fold_layout, heldout_texts(heldout))
    max_tokens = recipe.writing_rm.max_tokens
    cut = sum(len(text) > max_tokens for text in ids)
    if main_process():
        print(f"writing-rm: {cut} of {len(ids)} held-out texts are cut, longer than writing_rm.max_tokens = {max_tokens}")
    read = [text[-max_tokens:] for text in ids]
    by_text = scores_together(model, read)
    return judge_heldout(run, heldout, [by_text[tuple(text)] for text in read])


def heldout_texts(heldout: list[Pair]) -> list[tuple[str, str]]:
    """(prompt, text) of each chosen text, then of each rejected one, then of some chosen ones in markdown."""
    return [*((pair.prompt, pair.chosen) for pair in heldout), *((pair.prompt, pair.rejected) for pair in heldout),
            *((pair.prompt, markdown(pair.chosen)) for pair in heldout[::_MARKDOWN_EVERY])]


def judge_heldout(run: Run, heldout: list[Pair], scores: list[float]) -> dict:
    """Leave `scores.jsonl` and `quality.json` (see `quality`) for the scores of `heldout_texts`, and return the quality. Pairs
    of which a text has no score (NaN) are left out, and said. Raises RunError if none is left."""
    n = len(heldout)
    rows: list[dict] = [
        {"kind": pair.kind, "source": pair.source, "language": pair.language, "chosen": chosen, "rejected": rejected,
         "chosen_words": count_words(pair.chosen), "rejected_words": count_words(pair.rejected)}
        for pair, chosen, rejected in zip(heldout, scores[:n], scores[n : 2 * n], strict=True)]
    for row, score in zip(rows[::_MARKDOWN_EVERY], scores[2 * n :], strict=True):
        row |= {"markdown": score} if np.isfinite(score) else {}
    rows = [row for row in rows if np.isfinite([row["chosen"], row["rejected"]]).all()]
    if len(rows) < n and main_process():
        print(f"{n - len(rows)} of {n} held-out pairs are left out: the judge gave one of their texts no score", flush=True)
    if not rows:
        raise RunError(f"the judge gave none of {n} held-out pairs two scores")
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
    """Quality of a Writing RM on held-out pairs, where equal scores count as half a win everywhere: `accuracy` {kind or all:
    [share, low, high, pairs]} with Wilson's 95% interval, mean `margin`, `calibration` [[expected, observed win rate, pairs]]
    in fifths by expectation, and its gap, Spearman's correlation of score and words over the preferred texts, mean shift by
    markdown in standard deviations, `languages` {language: mean score}, and `floor`, the lowest score seen: that of an empty
    answer."""
    def accuracy(pairs: pd.DataFrame) -> list:
        share = float(win_rates(pairs.chosen, pairs.rejected).mean())
        return [share, *wilson(share, len(pairs)), len(pairs)]

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


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n; scipy's takes whole counts alone, and a tie is half a win."""
    z = norm.ppf(0.975)
    middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, float(middle - half) / (1 + z**2 / n)), min(1.0, float(middle + half) / (1 + z**2 / n))


def _finite(value) -> float | None:
    """The value, or None (JSON's null) where it cannot be computed: JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
