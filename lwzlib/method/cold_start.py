"""Cold start: teach the form to a model that does not emit it when asked. It is not in the paper.

The paper's base model emits the tags when asked, and its 30B tokens of continual pretraining hold 300M tokens of think/answer
documents. A 135M model emits the exact form in 0% of completions, so every group would be without variance and GRPO would learn
nothing. A few documents in the form mend that: the model's own answers, wrapped in the tags.
"""

import random
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lwzlib.base import trainers
from lwzlib.base.quantities import Sampling
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.method import prompts
from lwzlib.method.queries import load_queries
from lwzlib.method.sampling import completions
from lwzlib.method.text import count_words, split_sentences, whole_sentences


def cold_start(recipe: Recipe, run: Run) -> Path:
    """Train on the model's own answers in the form, half of them with a plan: only the form is taught. Returns the folder of
    the model. An interrupted cold start begins anew (it is short). Raises RunError if no answer can be kept."""
    if run.finished:
        return run.folder / "model"
    with run.work():
        run.rewind(0, "metrics")
        model, tokenizer = trainers.load_policy(recipe, recipe.model.name)
        documents = Dataset.from_list(_documents(recipe, run, model, tokenizer))
        taught = recipe.cold_start
        config = SFTConfig(
            num_train_epochs=taught.epochs, learning_rate=taught.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=2, per_device_train_batch_size=taught.batch_documents, max_length=None,
            **trainers.trainer_arguments(recipe, run, checkpoint_every_steps=None, lora=taught.lora))
        rows = trainers.Rows(run, trainers.SFT_COLUMNS)
        model, tokenizer = trainers.load_trainee(recipe, recipe.model.name, taught.lora)
        trainer = SFTTrainer(model, args=config, train_dataset=documents, processing_class=tokenizer, callbacks=[rows],
                             peft_config=trainers.lora_config(taught.lora, task_type="CAUSAL_LM"))
        trainers.save_trained(trainers.train_to_end(trainer), trainer, run)
    return run.folder / "model"


def _documents(recipe: Recipe, run: Run, model, tokenizer) -> list[dict]:
    """Two documents for each query, with and without a plan, of whole sentences; only what follows the prompt is learnt. With
    `within_range` the answers have the length that was asked for, so that a model which keeps to one still does."""
    queries = load_queries(recipe.data.train, recipe.data.languages)
    asked = random.Random(run.seed).sample(queries, min(recipe.cold_start.queries, len(queries)))
    framed = [prompts.render_bare(query.query, recipe.model.frame, tokenizer) for query in asked]
    sampling = Sampling(temperature=recipe.cold_start.temperature, top_p=1.0, max_new_tokens=recipe.cold_start.max_new_tokens)
    documents = []
    for i, text, *_ in completions(model, tokenizer, framed, sampling, recipe.samples.batch_completions, run.seed):
        (lower, upper), whole = asked[i].word_range, whole_sentences(text, folded=False)
        answer = "\n\n".join(" ".join(paragraph.split()) for paragraph in whole.split("\n\n") if paragraph.strip())
        if (i + 1) % 8 == 0:
            print(f"cold start: answer {i + 1}/{len(asked)}", flush=True)
        if recipe.cold_start.within_range and not lower <= count_words(answer) <= upper:
            continue
        for style in ("think", "direct"):
            prompt = prompts.render(asked[i].query, style, recipe.model.frame, recipe.prompt, tokenizer)
            completion = prompts.after_prompt(prompt, prompts.wrap(plan_of(answer), answer, style))
            documents.append({"prompt": prompt, "completion": completion + tokenizer.eos_token})
    if not documents:
        raise RunError(f"cold_start.within_range: none of the {len(asked)} answers of {recipe.model.name} has the length that "
                       "its query asks for; give cold_start.queries more, or cold_start.within_range=false")
    print(f"cold start: {len(documents) // 2} of {len(asked)} answers kept", flush=True)
    run.update(documents=len(documents), answers=len(asked),
               tokens=sum(len(tokenizer(d["prompt"] + d["completion"]).input_ids) for d in documents))
    return documents


def plan_of(answer: str) -> str:
    """Short plan: the answer's length, then an order. Its first word is a likely one: 40 steps do not teach "Length" there.

    >>> plan_of("Yeast makes gas. Gas makes holes.")
    'The answer has 1 paragraph, 2 sentences. First the main point, then what supports it.'
    """
    counts = {"paragraph": len(answer.split("\n\n")), "sentence": len(split_sentences(answer))}
    length = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    return f"The answer has {length}. First the main point, then what supports it."
