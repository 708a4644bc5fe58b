"""What vLLM servers on all nodes do for a stage: write its completions, then score them by the Writing RM."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator

from lwzlib.base.models import load_tokenizer, resolve
from lwzlib.base.parallel import URL, context_tokens
from lwzlib.base.policy import Policy
from lwzlib.base.quantities import Decoding
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.method.queries import Query
from lwzlib.method.rewards import build_rewards
from lwzlib.method.samples import framed_queries
from lwzlib.method.text import Style
from lwzlib.method.writing_rm import read_info, weights_of
from lwzlib.pipeline import ranks, vllm_servers


@contextlib.contextmanager
def judged(recipe: Recipe, run: Run, writing_rm: str | Callable) -> Iterator[Recipe]:
    """The recipe with an address for its Writing RM, which vLLM serves on all nodes inside the block: one process alone would
    score a few texts at a time. As it is where the recipe names a server, or pays for no writing."""
    if not recipe.reward.weights.writing or recipe.reward.writing.url:
        yield recipe
        return
    reward = build_rewards(recipe, writing_rm)["writing"]
    longest_tokens, options = read_info(reward.folder)["max_tokens"], vllm_servers.scores(reward.identity)
    with vllm_servers.serve(recipe, ranks.meet(vllm_servers.everywhere(recipe)), run.folder / "logs", 
                            resolve(weights_of(reward.folder)),
                            longest_tokens, False, options) as answers:
        writing = recipe.reward.writing.model_copy(update={"url": answers[URL]})
        yield recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"writing": writing})})


def write(recipe: Recipe, run: Run, name: str, policy: Policy, queries: list[Query], style: Style, how: Decoding,
            batch: int) -> list[tuple[int, str, bool, int]]:
    """(index of the query, completion, truncated, its tokens) of all queries, from vLLM on all nodes, `batch` at once in each
    copy of the model. A query that stands there n times is asked in n rounds, each with its own seed; replies are kept as they
    come."""
    from lwzlib.endpoints import engines, llm

    at, model = vllm_servers.everywhere(recipe), policy.folder(recipe, run)
    tokenizer = load_tokenizer(model, recipe.model.trust_remote_code)
    framed = framed_queries(recipe, queries, style, tokenizer)
    longest_tokens = context_tokens(framed, tokenizer, how.max_new_tokens)
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
        started = functools.cache(lambda: around.enter_context(
            vllm_servers.serve(recipe, ranks.meet(at), run.folder / "logs", model, longest_tokens, False)))

        def ask(*what):  # called only where something is missing
            settings = llm.configure(base_url=f"{started()[URL]}/v1", use_proxy=False, **asking)
            yield from engines.server(settings, run.folder / f"{name}.replies.jsonl").write(*what)

        for number, places in rounds.items():
            asked = [engines.QueryPrompt(queries[i].id, queries[i].query, framed[i]) for i in places]
            rows = engines.generate(engines.Engine({"engine": "vllm serve", "model": model}, ask), asked, how,
                                    run.folder / f"{name}.written-{number}.jsonl", seed=1_000 * run.seed + number)
            if refused := next((row for row in rows if row["error"]), None):
                raise RunError(f"vLLM refused query {refused['id']}: {refused['error']}")
            outputs += [(i, row["completion"], row["truncated"], row["tokens"]) for i, row in zip(places, rows, strict=True)]
    return sorted(outputs)
