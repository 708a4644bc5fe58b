"""Completions of a list of prompts with transformers in process, and the held-out samples of an arm."""

from collections.abc import Iterator
from pathlib import Path

from lwzlib import data, prompts, rewards
from lwzlib.quantities import Sampling
from lwzlib.recipe import Recipe
from lwzlib.runs import Run, RunError
from lwzlib.text import Style, count_words, parse


def completions(model, tokenizer, texts: list[str], sampling: Sampling, batch: int, seed: int,
                stop: list[str] | None = None, first: int = 0) -> Iterator[tuple[int, str, bool]]:
    """Yield (index of the prompt, completion, truncated) in order, as `counted` does."""
    for i, text, truncated, _ in counted(model, tokenizer, texts, sampling, batch, seed, stop, first):
        yield i, text, truncated


def counted(model, tokenizer, texts: list[str], sampling: Sampling, batch: int, seed: int,
            stop: list[str] | None = None, first: int = 0) -> Iterator[tuple[int, str, bool, int]]:
    """Yield (index of the prompt, completion, truncated, its tokens) in order, `batch` prompts at a time.

    Special tokens are dropped; `truncated` is true where neither the end of the text nor a stop string came within
    `max_new_tokens`; the end counts as a token. A batch depends on `seed` and its own place only, so that `first` (an
    index) can resume. A temperature of 0 is greedy.
    """
    import torch

    how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
           "top_k": getattr(sampling, "top_k", 0)} if sampling.temperature else {
           "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not hasattr(model, "hf_device_map"):  # else it lies on several GPUs
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    ends_of = torch.tensor(sorted(_ends(model, tokenizer)), device=model.device)
    for start in range(first // batch * batch, len(texts), batch):
        with torch.random.fork_rng():
            torch.manual_seed(seed + start)
            chunk = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True,
                              add_special_tokens=False).to(model.device)
            with torch.no_grad():
                output = model.generate(**chunk, **how, max_new_tokens=sampling.max_new_tokens, stop_strings=stop or None,
                                        tokenizer=tokenizer)
        for i, ids in enumerate(output[:, chunk["input_ids"].shape[1] :]):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            stopped = any(s in text for s in stop or [])
            ends = torch.isin(ids, ends_of).nonzero()  # of a text that a stop string ended, the padding
            yield start + i, text, not (stopped or len(ends)), int(ends[0]) + (not stopped) if len(ends) else len(ids)


def _ends(model, tokenizer) -> set[int]:
    """Tokens that end a text, or pad it: a model may have other ends than its tokenizer."""
    said = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, tokenizer.pad_token_id, *(said if isinstance(said, list) else [said])} - {None}


def scored(recipe: Recipe, run: Run, name: str, loaded: tuple, writing_rm: str, queries: list[data.Query], style: Style,
           sampling: Sampling, batch: int, stop: list[str]) -> list[dict]:
    """A completion of each query with its rewards, as rows `name` of the run; resumable batch by batch. `loaded`: model,
    tokenizer."""
    model, tokenizer = loaded
    whole = len(run.rows(name)) // batch * batch
    run.rewind(whole, name)
    scorers = rewards.build(recipe, writing_rm)
    framed = [prompts.render(q.query, style, recipe.model.frame, recipe.prompt, tokenizer) for q in queries]
    for i, text, truncated in completions(model, tokenizer, framed, sampling, batch, run.seed,
                                          stop, first=whole):
        query, parsed = queries[i], parse(text, style)
        asked = {"completions": [text], "style": [style], "word_range": [query.word_range], "query": [query.query]}
        run.append(name, {
            "step": i + 1, "id": query.id, "type": query.type, "query": query.query,
            "word_range": list(query.word_range), "completion": text, "truncated": truncated,
            "think_words": count_words(parsed.plan), "answer_words": count_words(parsed.answer),
        } | {reward: scorer(**asked)[0] for reward, scorer in scorers.items()})
        if (i + 1) % batch == 0 or i + 1 == len(queries):
            print(f"{run.folder.parent.name}/{run.folder.name}  {i + 1}/{len(queries)} completions", flush=True)
    return run.rows(name)


def samples(recipe: Recipe, run: Run, arm: str, model_name: str, writing_rm: str = "") -> Path:
    """What a model writes for the held-out queries, with its rewards: `samples.jsonl`."""
    from lwzlib import train

    if not run.finished:
        with run.work():
            _held_out(recipe, run, "samples", arm, train.load(recipe, model_name, spread=True), writing_rm)
    return run.folder


def samples_during(recipe: Recipe, run: Run, arm: str, start: str, grpo: Path, writing_rm: str = "") -> Path:
    """The same of each snapshot of the policy: `samples_<step>.jsonl`. Raises RunError if RL kept other ones."""
    from lwzlib import train

    if run.finished:
        return run.folder
    wanted = range(recipe.evaluation.every_steps, recipe.grpo.steps, recipe.evaluation.every_steps)
    if missing := [step for step in wanted if not (grpo / "snapshots" / str(step)).is_dir()]:
        raise RunError(f"{grpo} kept no policy of step {', '.join(map(str, missing))}: it was trained with another "
                       "evaluation.every_steps. Set that, or remove the folder and train again")
    with run.work():
        for step in wanted:
            if len(run.rows(f"samples_{step}")) < recipe.samples.queries:
                loaded = train.load_snapshot(recipe, grpo / "snapshots" / str(step), start)
                _held_out(recipe, run, f"samples_{step}", arm, loaded, writing_rm)
    return run.folder


def _held_out(recipe: Recipe, run: Run, name: str, arm: str, loaded: tuple, writing_rm: str) -> None:
    queries = data.load(recipe.data.heldout, recipe.data.languages)[: recipe.samples.queries]
    scored(recipe, run, name, loaded, writing_rm, queries, recipe.arm(arm).prompt, recipe.samples.sampling,
           recipe.samples.batch_completions, recipe.samples.stop)
