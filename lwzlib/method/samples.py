"""Completions of a list of prompts with transformers in process, and what a stage writes and scores: the held-out samples of
an arm, and what is distilled. Where the recipe has vLLM servers, those write for a stage."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lwzlib.base import models
from lwzlib.base.quantities import Decoding, Sampling
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.method import prompts
from lwzlib.method.queries import Query, load_queries
from lwzlib.method.rewards import build_rewards
from lwzlib.method.sampling import completions
from lwzlib.method.text import Style, count_words, parse

Writer = Callable[..., list[tuple[int, str, bool]]]  # (index of the query, completion, truncated) of all queries


class Policy(NamedTuple):
    """A model, or a snapshot of one that was trained from the model `start`."""

    name: str
    start: str = ""

    def load(self, recipe: Recipe):
        """(model, tokenizer), on all GPUs of the process."""
        from lwzlib.base import trainers

        if self.start:
            return trainers.load_snapshot(recipe, Path(self.name), self.start)
        return trainers.load_policy(recipe, self.name, spread=True)

    def folder(self, recipe: Recipe, run: Run) -> str:
        """What vLLM can load: of a snapshot that is an adapter, the model with it, in the folder of the run."""
        if not (Path(self.name) / "adapter_config.json").is_file():
            return models.resolve(self.name)
        merged = run.folder / ".policy"
        for part in self.load(recipe):
            part.save_pretrained(merged)
        return str(merged)


def scored(recipe: Recipe, run: Run, name: str, policy: Policy, writing_rm: str, queries: list[Query], style: Style,
           sampling: Sampling, batch: int, stop: list[str], write: Writer | None = None) -> list[dict]:
    """A completion of each query with its rewards, as rows `name` of the run; resumable batch by batch. `write` is who writes
    them where it is not this process (`pipeline.served`)."""
    whole = len(run.rows(name)) // batch * batch
    run.rewind(whole, name)
    how = Decoding(**sampling.model_dump(), stop=stop)
    if write:  # all of them before the rewards are built: both want all GPUs
        outputs = iter(write(recipe, run, name, policy, queries, style, how, batch)[whole:])
    else:
        model, tokenizer = policy.load(recipe)
        framed = framed_queries(recipe, queries, style, tokenizer)
        outputs = completions(model, tokenizer, framed, how, batch, run.seed, stop, first=whole)
    scorers = build_rewards(recipe, writing_rm)
    while some := list(itertools.islice(outputs, batch)):
        asked, texts = [queries[i] for i, _, _ in some], [text for _, text, _ in some]
        scores = {reward: scorer(completions=texts, style=[style] * len(some), word_range=[q.word_range for q in asked],
                                 query=[q.query for q in asked]) for reward, scorer in scorers.items()}
        for n, ((i, text, truncated), query) in enumerate(zip(some, asked, strict=True)):
            parsed = parse(text, style)
            run.append(name, {
                "step": i + 1, "id": query.id, "type": query.type, "query": query.query,
                "word_range": list(query.word_range), "completion": text, "truncated": truncated,
                "think_words": count_words(parsed.plan), "answer_words": count_words(parsed.answer),
            } | {reward: values[n] for reward, values in scores.items()})
        print(f"{run.folder.parent.name}/{run.folder.name}  {i + 1}/{len(queries)} completions", flush=True)
    return run.rows(name)


def framed_queries(recipe: Recipe, queries: list[Query], style: Style, tokenizer) -> list[str]:
    """The text that the model continues, for each query."""
    return [prompts.render(q.query, style, recipe.model.frame, recipe.prompt, tokenizer) for q in queries]


def write_samples(recipe: Recipe, run: Run, arm: str, model_name: str, writing_rm: str = "",
                  write: Writer | None = None) -> Path:
    """What a model writes for the held-out queries, with its rewards: `samples.jsonl`."""
    if not run.finished:
        with run.work():
            _held_out(recipe, run, "samples", arm, Policy(model_name), writing_rm, write)
    return run.folder


def write_samples_during(recipe: Recipe, run: Run, arm: str, start: str, grpo: Path, writing_rm: str = "",
                         write: Writer | None = None) -> Path:
    """The same of each snapshot of the policy: `samples_<step>.jsonl`. Raises RunError if RL kept other ones."""
    if run.finished:
        return run.folder
    wanted = range(recipe.evaluation.every_steps, recipe.grpo.steps, recipe.evaluation.every_steps)
    if missing := [step for step in wanted if not (grpo / "snapshots" / str(step)).is_dir()]:
        raise RunError(f"{grpo} kept no policy of step {', '.join(map(str, missing))}: it was trained with another "
                       "evaluation.every_steps. Set that, or remove the folder and train again")
    with run.work():
        for step in wanted:
            if len(run.rows(f"samples_{step}")) < recipe.samples.queries:
                policy = Policy(str(grpo / "snapshots" / str(step)), start)
                _held_out(recipe, run, f"samples_{step}", arm, policy, writing_rm, write)
    return run.folder


def _held_out(recipe: Recipe, run: Run, name: str, arm: str, policy: Policy, writing_rm: str,
              write: Writer | None) -> None:
    queries = load_queries(recipe.data.heldout, recipe.data.languages)[: recipe.samples.queries]
    scored(recipe, run, name, policy, writing_rm, queries, recipe.arm(arm).prompt, recipe.samples.sampling,
           recipe.samples.batch_completions, recipe.samples.stop, write)
