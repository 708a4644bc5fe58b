"""The benchmarks by name: what each asks, and how its completions are written.

WritingBench and LongBench-Write name their own sampling. Arena-Write names none: it gets that of LongWriter-Zero's model card.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from lwzlib.base.kit import LONGBENCH
from lwzlib.base.quantities import Decoding, Prompt
from lwzlib.base.rows import DataError, validated, write_rows
from lwzlib.endpoints import engines
from lwzlib.evaluate import arena, longbench, writingbench
from lwzlib.method.prompts import framed
from lwzlib.method.queries import load_queries
from lwzlib.method.text import Style

_CARD = Decoding(temperature=0.6, top_p=0.95, max_new_tokens=15_500)
_PROMPT = Prompt(wording="full", worked_examples=0)


class Bench(NamedTuple):
    """`read`(source) -> {id: item}; `query`, `type`: an item's fields; `source`: what comes with the kit."""

    read: Callable[[str], dict]
    query: str
    type: str
    decoding: Decoding
    source: str = ""


BENCHES = {
    "writingbench": Bench(writingbench.read_benchmark, "query", "domain1", writingbench.DECODING),
    "longbench": Bench(longbench.read_benchmark, "prompt", "type", longbench.DECODING, LONGBENCH),
    "arena": Bench(lambda source: arena.read_arena(source).tasks, "question", "type", _CARD),
    "queries": Bench(lambda source: {query.id: query for query in load_queries(source)}, "query", "type", _CARD, "kit:heldout"),
}


def read_bench(name: str, source: str = "") -> tuple[Bench, dict]:
    """(benchmark, its items). Raises DataError for an unknown name or a benchmark that the kit does not bring along."""
    if name not in BENCHES:
        raise DataError(f"no benchmark {name!r}; there are {', '.join(BENCHES)}")
    bench = BENCHES[name]
    if not (source or bench.source):
        raise DataError(f"{name} does not come with the kit: give --source, its file or hub:<dataset>")
    return bench, bench.read(source or bench.source)


def generate(name: str, source: str, engine: engines.Engine, style: Style | Literal["bare"], frame: str,
             to: Path, seed: int = 0, change: dict | None = None) -> list[dict]:
    """Completions of a benchmark's requests: all that is known of each in `<to>.rows.jsonl`, by which an interrupted call goes
    on, and in `to` what the benchmark reads: {index, response}, or {id, query, type, completion} for the arena.

    `style` bare asks the request alone; think and direct stop at `</answer>`. `change` sets fields of the decoding. A request
    that a server refused has no response. Raises DataError and what `engines.generate` raises.
    """
    bench, items = read_bench(name, source)
    stop = [] if style == "bare" else ["</answer>"]
    decoding = validated("decoding", bench.decoding.model_dump() | {"stop": stop} | (change or {}), Decoding)
    queries = [getattr(item, bench.query) for item in items.values()]
    prompts = [engines.QueryPrompt(str(key), query, framed(query, style, frame, _PROMPT))
               for key, query in zip(items, queries, strict=True)]
    rows = engines.generate(engine, prompts, decoding, to.with_suffix(".rows.jsonl"), seed)
    answered = [(key, item, row) for (key, item), row in zip(items.items(), rows, strict=True) if not row["error"]]
    write_rows(to, ({"index": key, "response": row["completion"]} if isinstance(key, int) else
                    {"id": key, "query": row["query"], "type": getattr(item, bench.type), "completion": row["completion"]}
                    for key, item, row in answered))
    return rows
