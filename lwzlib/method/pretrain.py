"""Continual pretraining before RL, on packed sequences.

The paper's 30B tokens are books, reports and papers, in sequences of 32K tokens and batches of 512, with 1% of long
think/answer documents distilled from the Base-think arm. Learning rate, schedule and the mixture's shares are not published.
The kit measures the perplexity of each source's held-out documents, before and after.
"""

import math
import os
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from lwzlib.base import models, trainers
from lwzlib.base.parallel import dealt
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, read_rows
from lwzlib.base.run_folder import Run


def pretrain(recipe: Recipe, run: Run, start: str, corpus: Path, packed: Path) -> Path:
    """Train one pass over the packed shards; returns the folder of the model. Resumes from the last whole checkpoint.

    Leaves `model/`, `metrics.jsonl`, and `perplexity.jsonl`: one row per source, before and after.
    """
    if run.finished:
        return run.folder / "model"
    settings, processes = recipe.pretrain, int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_sequences % processes:
        raise RunError(f"pretrain.batch_sequences={settings.batch_sequences} cannot be cut over {processes} processes")
    with run.work():
        last = trainers.last_checkpoint(run, "metrics")
        run.rewind(len(recipe.corpus.sources) if last else 0, "perplexity")  # what was measured after is measured again
        sequences = concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(packed.glob("*.arrow"))])
        config = SFTConfig(
            num_train_epochs=1, learning_rate=settings.learning_rate, lr_scheduler_type=settings.lr_schedule,
            warmup_steps=settings.warmup_steps, per_device_train_batch_size=1, max_length=None, padding_free=True,
            gradient_accumulation_steps=settings.batch_sequences // processes, dataset_kwargs={"skip_prepare_dataset": True},
            **trainers.trainer_arguments(recipe, run, settings.checkpoint_every_steps))
        model, tokenizer = trainers.load_trainee(recipe, start)
        trainer = SFTTrainer(model, args=config, train_dataset=sequences, processing_class=tokenizer,
                             callbacks=[trainers.Rows(run, trainers.SFT_COLUMNS)])
        if not last:
            trainer.add_callback(trainers.AtBegin(lambda model: _measure(recipe, run, "before", model, tokenizer, corpus)))
        trained = trainers.train_to_end(trainer, last)
        _measure(recipe, run, "after", trained, tokenizer, corpus)
        trainers.save_trained(trained, trainer, run)
    return run.folder / "model"


def _measure(recipe: Recipe, run: Run, when: str, model, tokenizer, corpus: Path) -> None:
    parts = recipe.corpus.parts
    for number, source in enumerate(recipe.corpus.sources):
        files = [corpus / "heldout" / f"{task:05d}.jsonl" for task in range(number * parts, (number + 1) * parts)]
        texts = [row["text"] for file in files for row in read_rows(file)]
        tokens, value = perplexity(model, tokenizer, texts, recipe.pretrain.sequence_tokens, recipe.pretrain.heldout_tokens)
        row = {"step": len(run.rows("perplexity")) + 1, "when": when, "source": f"{source.at} ({source.language})",
               "tokens": tokens, "perplexity": value}
        run.append("perplexity", row)
        result = "no held-out document" if value is None else f"{value:.2f} over {tokens} held-out tokens"
        print(f"pretrain: perplexity {when}, {row['source']}: {result}", flush=True)


def perplexity(model, tokenizer, texts: list[str], sequence_tokens: int, at_most_tokens: int) -> tuple[int, float | None]:
    """(tokens predicted, exp of their mean negative log-likelihood); None where there is no token to predict.

    Each text is cut into sequences of its own, and gives at most the same number of tokens as the others. The processes share
    the sequences. `model` has TRL's fused head: logits of a sequence of 32,768 tokens would take 20 GB.
    """
    sequences: list[list[int]] = []
    for text in texts:
        text_tokens = max(2, at_most_tokens // len(texts))
        ids = tokenizer(text, truncation=True, max_length=text_tokens, add_special_tokens=False).input_ids
        sequences += [ids[start : start + sequence_tokens] for start in range(0, len(ids) - 1, sequence_tokens)]

    def losses(own: list[list[int]]) -> list[float]:
        rows = [torch.tensor([sequence], device=models.input_device(model)) for sequence in own]
        with torch.no_grad():
            return [-model(row, labels=row, fused_lm_head=True).log_probs.double().sum().item() for row in rows]

    loss, predicted_tokens = sum(dealt(sequences, losses)), sum(len(sequence) - 1 for sequence in sequences)
    return predicted_tokens, math.exp(loss / predicted_tokens) if predicted_tokens else None
