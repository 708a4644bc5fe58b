"""Supervised stages before RL: the cold start, and continual pretraining.

Continual pretraining is the paper's: packed sequences of books, reports and papers, with a share of long think/answer
documents distilled from the Base-think arm; its learning rate and schedule are not published.

The cold start is a departure. The paper's base model emits the tags when asked, and its 30B tokens of continual pretraining
hold 300M tokens of think/answer documents. A 135M model emits the exact form in 0% of completions, so every group would
be without variance and GRPO would learn nothing. A few documents in the form mend that.
"""

import math
import os
import random
from pathlib import Path

from lwzlib import data, generate, prompts
from lwzlib.quantities import Sampling
from lwzlib.recipe import Recipe
from lwzlib.runs import Run, RunError, read_rows
from lwzlib.text import count_words, whole_sentences

_TOPIC_WORDS = 8  # of the end of a request, where the kit's queries name what they are about


def pretrain(recipe: Recipe, run: Run, start: str, corpus: Path, packed: Path) -> Path:
    """The stage `pretrain`: one pass over the packed shards. Resumes from the last whole checkpoint.

    Leaves `model/`, `metrics.jsonl`, and `perplexity.jsonl`: of each source's held-out documents, before and after.
    """
    if run.finished:
        return run.folder / "model"
    from datasets import Dataset, concatenate_datasets
    from trl import SFTConfig, SFTTrainer

    from lwzlib import train

    asked, processes = recipe.pretrain, int(os.environ.get("WORLD_SIZE", "1"))
    if asked.batch_sequences % processes:
        raise RunError(f"pretrain.batch_sequences={asked.batch_sequences} cannot be cut over {processes} processes")
    with run.work():
        last = train.resumed(run, "metrics")
        run.rewind(len(recipe.corpus.sources) if last else 0, "perplexity")  # what was measured after is measured again
        sequences = concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(packed.glob("*.arrow"))])
        config = SFTConfig(
            num_train_epochs=1, learning_rate=asked.learning_rate, lr_scheduler_type=asked.lr_schedule,
            warmup_steps=asked.warmup_steps, per_device_train_batch_size=1,
            gradient_accumulation_steps=asked.batch_sequences // processes, max_length=None, padding_free=True,
            dataset_kwargs={"skip_prepare_dataset": True}, **train.checkpoints(asked.checkpoint_every_steps),
            **train.arguments(recipe, run))
        model, tokenizer = train.load(recipe, start)
        trainer = SFTTrainer(model, args=config, train_dataset=sequences, processing_class=tokenizer,
                             callbacks=[train.Rows(run, train.SFT_COLUMNS)])
        if not last:
            trainer.add_callback(train.AtBegin(lambda model: _measure(recipe, run, "before", model, tokenizer, corpus)))
        trained = train.go(trainer, last)
        _measure(recipe, run, "after", trained, tokenizer, corpus)
        train.save(trained, trainer, run)
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


def cold_start(recipe: Recipe, run: Run) -> Path:
    """One epoch on the model's own paragraphs wrapped in the tags, half of them with a plan: only the form is taught.

    Returns the folder of the model. An interrupted cold start begins anew (it is short).
    """
    if run.finished:
        return run.folder / "model"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lwzlib import train

    with run.work():
        run.rewind(0, "metrics")
        model, tokenizer = train.load(recipe, recipe.model.name)
        documents = Dataset.from_list(_documents(recipe, run, model, tokenizer))
        config = SFTConfig(
            num_train_epochs=1, learning_rate=recipe.cold_start.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=2, per_device_train_batch_size=recipe.cold_start.batch_documents, save_strategy="no",
            max_length=None, **train.arguments(recipe, run))
        rows = train.Rows(run, train.SFT_COLUMNS)
        trainer = SFTTrainer(model, args=config, train_dataset=documents, processing_class=tokenizer, callbacks=[rows])
        train.save(train.go(trainer), trainer, run)
    return run.folder / "model"


def _documents(recipe: Recipe, run: Run, model, tokenizer) -> list[dict]:
    """Two for each query: with and without a plan that names the topic and the true length of the paragraph. It is short,
    because what a plan takes of `max_new_tokens` the answer lacks."""
    queries = data.load(recipe.data.train, recipe.data.languages)
    asked = [q.query for q in random.Random(run.seed).sample(queries, min(recipe.cold_start.queries, len(queries)))]
    framed = [prompts.render_bare(query, recipe.model.frame, tokenizer) for query in asked]
    sampling = Sampling(temperature=recipe.cold_start.temperature, top_p=1.0,
                        max_new_tokens=recipe.cold_start.max_new_tokens)
    documents = []
    for i, text, _ in generate.completions(model, tokenizer, framed, sampling, recipe.samples.batch_completions, run.seed):
        answer = whole_sentences(text)
        about = " ".join(asked[i].rstrip(".。?？").split()[-_TOPIC_WORDS:])
        plan = (f"Topic: {about}. First the main point, then an example, then an ending. "
                f"Length: about {round(count_words(answer), -1)} words.")
        for style in ("think", "direct"):
            prompt = prompts.render(asked[i], style, recipe.model.frame, recipe.prompt, tokenizer)
            documents.append({"text": prompt + prompts.wrap(plan, answer, style) + tokenizer.eos_token})
        print(f"cold start: paragraph {i + 1}/{len(asked)}", flush=True) if (i + 1) % 8 == 0 else None
    run.update(documents=len(documents), tokens=sum(len(tokenizer(d["text"]).input_ids) for d in documents))
    return documents
