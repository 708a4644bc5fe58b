"""Completions of a list of prompts with transformers in process, and what a stage writes and scores: the held-out samples of
an arm, and what is distilled. Where the recipe has vLLM servers, those write for a stage."""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lwzlib import data, models, prompts, rewards
from lwzlib.quantities import Decoding, Sampling
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


class Policy(NamedTuple):
    """A model, or a snapshot of one that was trained from the model `start`."""

    name: str
    start: str = ""

    def load(self, recipe: Recipe):
        """(model, tokenizer), on all GPUs of the process."""
        from lwzlib import train

        return train.load_snapshot(recipe, Path(self.name), self.start) if self.start else train.load(recipe, self.name, True)

    def folder(self, recipe: Recipe, run: Run) -> str:
        """What vLLM can load: of a snapshot that is an adapter, the model with it, in the folder of the run."""
        if not (Path(self.name) / "adapter_config.json").is_file():
            return models.resolve(self.name)
        merged = run.folder / ".policy"
        for part in self.load(recipe):
            part.save_pretrained(merged)
        return str(merged)


def scored(recipe: Recipe, run: Run, name: str, policy: Policy, writing_rm: str, queries: list[data.Query], style: Style,
           sampling: Sampling, batch: int, stop: list[str]) -> list[dict]:
    """A completion of each query with its rewards, as rows `name` of the run; resumable batch by batch. Raises RunError if a
    server refuses a prompt."""
    whole = len(run.rows(name)) // batch * batch
    run.rewind(whole, name)
    how = Decoding(**sampling.model_dump(), stop=stop)
    if recipe.vllm.mode == "server":  # all of them before the rewards are built: both want all GPUs
        outputs = iter(_served(recipe, run, name, policy, queries, style, how, batch)[whole:])
    else:
        model, tokenizer = policy.load(recipe)
        framed = _framed(recipe, queries, style, tokenizer)
        outputs = completions(model, tokenizer, framed, how, batch, run.seed, stop, first=whole)
    scorers = rewards.build(recipe, writing_rm)
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


def _framed(recipe: Recipe, queries: list[data.Query], style: Style, tokenizer) -> list[str]:
    return [prompts.render(q.query, style, recipe.model.frame, recipe.prompt, tokenizer) for q in queries]


def _served(recipe: Recipe, run: Run, name: str, policy: Policy, queries: list[data.Query], style: Style, how: Decoding,
            batch: int) -> list[tuple[int, str, bool]]:
    """(index of the query, completion, truncated) of all queries, from vLLM on all nodes, `batch` at once in each copy of the
    model. A query that stands there n times is asked in n rounds, each with its own seed; replies are kept as they come."""
    from lwzlib import engines, llm, serving

    at, model = serving.everywhere(recipe), policy.folder(recipe, run)
    framed = _framed(recipe, queries, style, models.tokenizer(model, recipe.model.trust_remote_code))
    rounds: dict[int, list[int]] = {}
    times: Counter[str] = Counter()
    for i, query in enumerate(queries):
        rounds.setdefault(times[query.id], []).append(i)
        times[query.id] += 1
    copies = len(at.servers) * at.processes // recipe.vllm.tensor_parallel
    slowest_s = 60 + how.max_new_tokens / 10  # ten tokens a second, far below what a full GPU writes
    asking = {"model": model, "concurrency": batch * copies, "timeout_s": slowest_s, "patience_s": slowest_s,
              "sampling": {"include_stop_str_in_output": True, "add_special_tokens": False}}
    outputs = []
    with contextlib.ExitStack() as around:
        started = functools.cache(lambda: around.enter_context(serving.serve(recipe, at, run.folder / "logs", model, False)))

        def write(*what):  # called only where something is missing
            settings = llm.configure(base_url=f"{started()[serving.URL]}/v1", **asking)
            yield from engines.server(settings, run.folder / f"{name}.replies.jsonl").write(*what)

        for number, places in rounds.items():
            asked = [engines.Asked(queries[i].id, queries[i].query, framed[i]) for i in places]
            rows = engines.generate(engines.Engine({"engine": "vllm serve", "model": model}, write), asked, how,
                                    run.folder / f"{name}.written-{number}.jsonl", seed=1_000 * run.seed + number)
            if refused := next((row for row in rows if row["error"]), None):
                raise RunError(f"vLLM refused query {refused['id']}: {refused['error']}")
            outputs += [(i, row["completion"], row["truncated"]) for i, row in zip(places, rows, strict=True)]
    return sorted(outputs)


def samples(recipe: Recipe, run: Run, arm: str, model_name: str, writing_rm: str = "") -> Path:
    """What a model writes for the held-out queries, with its rewards: `samples.jsonl`."""
    if not run.finished:
        with run.work():
            _held_out(recipe, run, "samples", arm, Policy(model_name), writing_rm)
    return run.folder


def samples_during(recipe: Recipe, run: Run, arm: str, start: str, grpo: Path, writing_rm: str = "") -> Path:
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
                _held_out(recipe, run, f"samples_{step}", arm, Policy(str(grpo / "snapshots" / str(step)), start), writing_rm)
    return run.folder


def _held_out(recipe: Recipe, run: Run, name: str, arm: str, policy: Policy, writing_rm: str) -> None:
    queries = data.load(recipe.data.heldout, recipe.data.languages)[: recipe.samples.queries]
    scored(recipe, run, name, policy, writing_rm, queries, recipe.arm(arm).prompt, recipe.samples.sampling,
           recipe.samples.batch_completions, recipe.samples.stop)
