"""Long chain-of-thought documents: what a trained arm writes, plan and work, for training queries.

The paper mixes 1% of them, distilled from the Base-think model, into continual pretraining. How many were generated and
how they were chosen is not published: here each query is answered several times, the completion with the highest fused
advantage of its group is kept if its form is exact and it ended by itself (`cot.exact_only`), and near copies are taken out.
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lwzlib.base.models import load_tokenizer
from lwzlib.base.policy import Policy
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, write_rows
from lwzlib.base.run_folder import Run
from lwzlib.method import prompts
from lwzlib.method.advantage import Fusion
from lwzlib.method.queries import load_queries
from lwzlib.method.rewards import reward_names
from lwzlib.method.samples import scored
from lwzlib.method.text import TAGS, parse


def distil(recipe: Recipe, run: Run, model_name: str, writing_rm: str, tokenise: Callable, served=None) -> Path:
    """Leave `documents.jsonl` {id, text, query, answer}, which `tokenise`(recipe, sources, folder) turns into token files;
    returns the run's folder. `served` as in `samples.scored`. Raises RunError where no completion can be kept."""
    if run.finished:
        return run.folder
    settings, arm = recipe.cot, recipe.arm(recipe.cot.arm)
    with run.work():
        queries = load_queries(recipe.data.train, recipe.data.languages)
        chosen = random.Random(run.seed).sample(queries, min(settings.queries, len(queries)))
        repeated = [query for query in chosen for _ in range(settings.completions_per_query)]
        rows = scored(recipe, run, "completions", Policy(model_name), writing_rm, repeated, arm.prompt,
                      recipe.grpo.sampling, settings.batch_completions, [TAGS[arm.prompt][-1]], served)
        best, left_out = choose(recipe, rows)
        if not best:
            raise RunError(f"none of {len(rows)} completions of {model_name} can be a document: {left_out}. Train arm "
                           f"{settings.arm} for longer, or set pretrain.cot_token_fraction=0")
        tokenizer = load_tokenizer(recipe.model.name, recipe.model.trust_remote_code)
        framed = [prompts.render(row["query"], arm.prompt, recipe.model.frame, recipe.prompt, tokenizer) for row in best]
        write_rows(run.folder / "documents.jsonl", (
            {"id": row["id"], "query": row["query"], "answer": parse(row["completion"], arm.prompt).answer,
             "text": prompt + prompts.after_prompt(prompt, row["completion"].strip())}
            for row, prompt in zip(best, framed, strict=True)))
        tokenise(recipe, [str(run.folder / "documents.jsonl")], run.folder)
        run.update(documents=len(best), left_out=left_out)
    return run.folder


def choose(recipe: Recipe, rows: list[dict]) -> tuple[list[dict], dict]:
    """(rows kept, {reason: rows left out}) of the best completions, one per group of `completions_per_query` rows."""
    size, names = recipe.cot.completions_per_query, reward_names(recipe)
    weights = [getattr(recipe.reward.weights, name) for name in names]
    rewards = np.array([row[name] for row in rows for name in names], dtype=float).reshape(-1, size, len(names))
    style, kept, left_out = recipe.arm(recipe.cot.arm).prompt, [], Counter()
    advantages = Fusion.of(recipe)(rewards, weights, names, [row["completion"] for row in rows], style)
    best = advantages.argmax(axis=1) + np.arange(0, len(rows), size)
    for row in (rows[i] for i in best):
        if recipe.cot.exact_only and row["truncated"]:
            left_out["truncated"] += 1
        elif recipe.cot.exact_only and not parse(row["completion"], style).exact:
            left_out["form not exact"] += 1
        else:
            kept.append(row)
    return kept, dict(left_out)
