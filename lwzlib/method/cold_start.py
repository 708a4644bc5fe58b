"""Cold start: teach the form to a model that does not emit it when asked. It is not in the paper.

The paper's base model emits the tags when asked, and its 30B tokens of continual pretraining hold 300M tokens of think/answer
documents. A 135M model emits the exact form in 0% of completions, so every group would be without variance and GRPO would learn
nothing. A few documents in the form mend that: the model's own paragraphs, wrapped in the tags.
"""

import random
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lwzlib.base import trainers
from lwzlib.base.quantities import Sampling
from lwzlib.base.recipe import Recipe
from lwzlib.base.run_folder import Run
from lwzlib.method import prompts
from lwzlib.method.queries import load_queries
from lwzlib.method.sampling import completions
from lwzlib.method.text import count_words, whole_sentences

_TOPIC_WORDS = 8  # of the end of a request, where the kit's queries name what they are about


def cold_start(recipe: Recipe, run: Run) -> Path:
    """Train one epoch on the model's own paragraphs in the form, half of them with a plan: only the form is taught. Returns the
    folder of the model. An interrupted cold start begins anew (it is short)."""
    if run.finished:
        return run.folder / "model"
    with run.work():
        run.rewind(0, "metrics")
        model, tokenizer = trainers.load_policy(recipe, recipe.model.name)
        documents = Dataset.from_list(_documents(recipe, run, model, tokenizer))
        config = SFTConfig(
            num_train_epochs=1, learning_rate=recipe.cold_start.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=2, per_device_train_batch_size=recipe.cold_start.batch_documents, max_length=None,
            **trainers.trainer_arguments(recipe, run, checkpoint_every_steps=None))
        rows = trainers.Rows(run, trainers.SFT_COLUMNS)
        model, tokenizer = trainers.load_trainee(recipe, recipe.model.name)
        trainer = SFTTrainer(model, args=config, train_dataset=documents, processing_class=tokenizer, callbacks=[rows])
        trainers.save_trained(trainers.train_to_end(trainer), trainer, run)
    return run.folder / "model"


def _documents(recipe: Recipe, run: Run, model, tokenizer) -> list[dict]:
    """Two documents for each query: with and without a plan that names the topic and the true length of the paragraph. The
    plan is short, because what it takes of `max_new_tokens` the answer lacks."""
    queries = load_queries(recipe.data.train, recipe.data.languages)
    requests = [q.query for q in random.Random(run.seed).sample(queries, min(recipe.cold_start.queries, len(queries)))]
    framed = [prompts.render_bare(request, recipe.model.frame, tokenizer) for request in requests]
    sampling = Sampling(temperature=recipe.cold_start.temperature, top_p=1.0, max_new_tokens=recipe.cold_start.max_new_tokens)
    documents = []
    for i, text, *_ in completions(model, tokenizer, framed, sampling, recipe.samples.batch_completions, run.seed):
        answer = whole_sentences(text)
        topic = " ".join(requests[i].rstrip(".。?？").split()[-_TOPIC_WORDS:])
        plan = (f"Topic: {topic}. First the main point, then an example, then an ending. "
                f"Length: about {round(count_words(answer), -1)} words.")
        for style in ("think", "direct"):
            prompt = prompts.render(requests[i], style, recipe.model.frame, recipe.prompt, tokenizer)
            completion = prompts.after_prompt(prompt, prompts.wrap(plan, answer, style))
            documents.append({"text": prompt + completion + tokenizer.eos_token})
        if (i + 1) % 8 == 0:
            print(f"cold start: paragraph {i + 1}/{len(requests)}", flush=True)
    run.update(documents=len(documents), tokens=sum(len(tokenizer(d["text"]).input_ids) for d in documents))
    return documents
