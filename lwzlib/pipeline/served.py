"""Completions of a stage by vLLM servers on all nodes."""

import contextlib
import functools
from collections import Counter

from lwzlib.base.models import load_tokenizer
from lwzlib.base.policy import Policy
from lwzlib.base.quantities import Decoding
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.method.queries import Query
from lwzlib.method.samples import framed_queries
from lwzlib.method.text import Style


def write(recipe: Recipe, run: Run, name: str, policy: Policy, queries: list[Query], style: Style, how: Decoding,
            batch: int) -> list[tuple[int, str, bool]]:
    """(index of the query, completion, truncated) of all queries, from vLLM on all nodes, `batch` at once in each copy of the
    model. A query that stands there n times is asked in n rounds, each with its own seed; replies are kept as they come."""
    from lwzlib.base.parallel import URL
    from lwzlib.endpoints import engines, llm
    from lwzlib.pipeline import vllm_servers

    at, model = vllm_servers.everywhere(recipe), policy.folder(recipe, run)
    framed = framed_queries(recipe, queries, style, load_tokenizer(model, recipe.model.trust_remote_code))
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
            vllm_servers.serve(recipe, at, run.folder / "logs", model, False)))

        def ask(*what):  # called only where something is missing
            settings = llm.configure(base_url=f"{started()[URL]}/v1", **asking)
            yield from engines.server(settings, run.folder / f"{name}.replies.jsonl").write(*what)

        for number, places in rounds.items():
            asked = [engines.QueryPrompt(queries[i].id, queries[i].query, framed[i]) for i in places]
            rows = engines.generate(engines.Engine({"engine": "vllm serve", "model": model}, ask), asked, how,
                                    run.folder / f"{name}.written-{number}.jsonl", seed=1_000 * run.seed + number)
            if refused := next((row for row in rows if row["error"]), None):
                raise RunError(f"vLLM refused query {refused['id']}: {refused['error']}")
            outputs += [(i, row["completion"], row["truncated"]) for i, row in zip(places, rows, strict=True)]
    return sorted(outputs)
