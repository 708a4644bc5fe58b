"""Samples of a policy with their rewards: what an arm writes for held-out queries, before, during and after RL.

The paper rates its arms by Arena-Write over the RL steps (Fig 3). The kit lets every kept policy write for its own held-out
queries. `scored` also writes what `distil` chooses from. Where the recipe has vLLM, its servers write the completions.
"""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

from lwzlib.base.awaited import scores_of
from lwzlib.base.policy import Policy
from lwzlib.base.quantities import Decoding, Sampling
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.method import prompts
from lwzlib.method.queries import Query, load_queries
from lwzlib.method.rewards import build_rewards
from lwzlib.method.sampling import completions
from lwzlib.method.text import Style, count_words, parse


def scored(recipe: Recipe, run: Run, name: str, policy: Policy, writing_rm: str, queries: list[Query], style: Style,
           sampling: Sampling, batch: int, stop: list[str], served: ModuleType | None = None) -> list[dict]:
    """One completion per query with its rewards, as rows `name` of the run; resumable batch by batch. `pipeline.served`
    writes and scores them where it is not this process that does."""
    whole = len(run.rows(name)) // batch * batch
    run.rewind(whole, name)
    decoding = Decoding(**sampling.model_dump(), stop=stop)
    if served:  # all of them before the rewards are built: both want all GPUs
        outputs: Iterator[tuple] = iter(served.write(recipe, run, name, policy, queries, style, decoding, batch)[whole:])
    else:
        model, tokenizer = policy.load(recipe)
        framed = framed_queries(recipe, queries, style, tokenizer)
        outputs = completions(model, tokenizer, framed, decoding, batch, run.seed, stop, first=whole)
    with served.judged(recipe, run, writing_rm) if served else nullcontext(recipe) as judged:
        rewards = build_rewards(judged, writing_rm)
        while written := list(itertools.islice(outputs, batch)):
            _score(run, name, queries, style, rewards, written)
    return run.rows(name)


def _score(run: Run, name: str, queries: list[Query], style: Style, rewards: dict, written: list[tuple]) -> None:
    """Append the rows of a batch of completions, with their rewards."""
    rows: list[dict] = []
    for i, text, truncated, _ in written:
        query, parsed = queries[i], parse(text, style)
        rows.append({"step": i + 1, "id": query.id, "type": query.type, "query": query.query,
                     "word_range": list(query.word_range), "completion": text, "truncated": truncated,
                     "think_words": count_words(parsed.plan), "answer_words": count_words(parsed.answer)})
    columns = {"completions": [row["completion"] for row in rows], "query": [row["query"] for row in rows],
               "word_range": [row["word_range"] for row in rows], "style": [style] * len(rows),
               "completion_ids": [range(tokens) for *_, tokens in written],  # what is scored is their number
               "log_metric": lambda name, share: share and print(f"{name}: {share:.0%} of a batch of completions")}
    for reward_name, reward in rewards.items():
        for row, score in zip(rows, scores_of(reward, **columns), strict=True):
            row[reward_name] = score
    run.append(name, *rows)
    print(f"{run.folder.parent.name}/{run.folder.name}  {rows[-1]['step']}/{len(queries)} completions", flush=True)


def framed_queries(recipe: Recipe, queries: list[Query], style: Style, tokenizer) -> list[str]:
    """Text that the model continues for each query."""
    return [prompts.render(q.query, style, recipe.model.frame, recipe.prompt, tokenizer) for q in queries]


def write_samples(recipe: Recipe, run: Run, arm: str, model_name: str, writing_rm: str = "",
                  served: ModuleType | None = None) -> Path:
    """Let a model answer the held-out queries and score the answers: `samples.jsonl`. Returns the run's folder."""
    return _write(recipe, run, arm, {"samples": Policy(model_name)}, writing_rm, served)


def write_samples_during(recipe: Recipe, run: Run, arm: str, start: str, grpo: Path, writing_rm: str = "",
                         served: ModuleType | None = None) -> Path:
    """Let each snapshot of the policy answer them: `samples_<step>.jsonl`. Raises RunError if RL did not keep a snapshot."""
    wanted = range(recipe.evaluation.every_steps, recipe.grpo.steps, recipe.evaluation.every_steps)
    snapshots = {step: grpo / "snapshots" / str(step) for step in wanted}
    missing = [str(step) for step, folder in snapshots.items() if not folder.is_dir()]
    if missing and not run.finished:
        raise RunError(f"{grpo} kept no policy of step {', '.join(missing)}: it was trained with another "
                       "evaluation.every_steps. Set that, or remove the folder and train again")
    policies = {f"samples_{step}": Policy(str(folder), start) for step, folder in snapshots.items()}
    return _write(recipe, run, arm, policies, writing_rm, served)


def _write(recipe: Recipe, run: Run, arm: str, policies: dict[str, Policy], writing_rm: str, served: ModuleType | None) -> Path:
    if not run.finished:
        with run.work():
            queries = load_queries(recipe.data.heldout, recipe.data.languages)[: recipe.samples.queries]
            for name, policy in policies.items():
                if len(run.rows(name)) < len(queries):
                    scored(recipe, run, name, policy, writing_rm, queries, recipe.arm(arm).prompt, recipe.samples.sampling,
                           recipe.samples.batch_completions, recipe.samples.stop, served)
    return run.folder
