"""Supervised stages before RL: the cold start, and continual pretraining.

Continual pretraining is the paper's: packed sequences of books, reports and papers, with a share of long think/answer
documents distilled from the Base-think arm; its learning rate and schedule are not published.

The cold start is a departure. The paper's base model emits the tags when asked, and its 30B tokens of continual pretraining
hold 300M tokens of think/answer documents. A 135M model emits the exact form in 0% of completions, so every group would
be without variance and GRPO would learn nothing. A few documents in the form mend that.
"""

import math
import os
from pathlib import Path

from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, read_rows
from lwzlib.base.run_folder import Run


def pretrain(recipe: Recipe, run: Run, start: str, corpus: Path, packed: Path) -> Path:
    """The stage `pretrain`: one pass over the packed shards. Resumes from the last whole checkpoint.

    Leaves `model/`, `metrics.jsonl`, and `perplexity.jsonl`: of each source's held-out documents, before and after.
    """
    if run.finished:
        return run.folder / "model"
    from datasets import Dataset, concatenate_datasets
    from trl import SFTConfig, SFTTrainer

    from lwzlib.base import trainers

    asked, processes = recipe.pretrain, int(os.environ.get("WORLD_SIZE", "1"))
    if asked.batch_sequences % processes:
        raise RunError(f"pretrain.batch_sequences={asked.batch_sequences} cannot be cut over {processes} processes")
    with run.work():
        last = trainers.last_checkpoint(run, "metrics")
        run.rewind(len(recipe.corpus.sources) if last else 0, "perplexity")  # what was measured after is measured again
        sequences = concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(packed.glob("*.arrow"))])
        config = SFTConfig(
            num_train_epochs=1, learning_rate=asked.learning_rate, lr_scheduler_type=asked.lr_schedule,
            warmup_steps=asked.warmup_steps, per_device_train_batch_size=1,
            gradient_accumulation_steps=asked.batch_sequences // processes, max_length=None, padding_free=True,
            dataset_kwargs={"skip_prepare_dataset": True}, **trainers.checkpoint_arguments(asked.checkpoint_every_steps),
            **trainers.trainer_arguments(recipe, run))
        model, tokenizer = trainers.load_policy(recipe, start)
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
        shown = "no held-out document" if value is None else f"{value:.2f} over {tokens} held-out tokens"
        print(f"pretrain: perplexity {when}, {row['source']}: {shown}", flush=True)


def perplexity(model, tokenizer, texts: list[str], sequence_tokens: int, at_most_tokens: int) -> tuple[int, float | None]:
    """(tokens predicted, exp of their mean negative log-likelihood), each text cut into sequences of its own, the same
    share of each text; None where there is no token to predict."""
    import torch

    if not texts:
        return 0, None
    share, loss, predicted = max(2, at_most_tokens // len(texts)), 0.0, 0
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=share, add_special_tokens=False).input_ids
        for cut in (ids[i : i + sequence_tokens] for i in range(0, len(ids), sequence_tokens)):
            if len(cut) > 1:
                with torch.no_grad():
                    here = torch.tensor([cut], device=model.device)
                    loss += model(here, labels=here).loss.double().item() * (len(cut) - 1)
                predicted += len(cut) - 1
    return predicted, math.exp(loss / predicted) if predicted else None
