"""Select training queries as the paper does: a judge keeps those that need long, high-quality writing, and predicts how many
words each really needs. The paper asks QwQ-32B; any OpenAI-compatible endpoint does.

The paper does not publish its two prompts; `texts/curation_prompts.yaml` words them anew from what it says they ask for. A
predicted range is held to the rules by `word_ranges.enforce`, and a length that the query states itself outranks any guess.
"""

import hashlib
from pathlib import Path

from pydantic import BaseModel

from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import DataError, read_yaml, rows_of, validated, write_rows
from lwzlib.data.word_ranges import Range, enforce
from lwzlib.endpoints import llm
from lwzlib.method.queries import Query
from lwzlib.method.text import fold, language_of

_PROMPTS = read_yaml(TEXTS / "curation_prompts.yaml")
FILTER, RANGE = _PROMPTS["filter"], _PROMPTS["range"]  # {`en` or `zh`: prompt with {query}}


# No docstrings: they would stand in the JSON schema that an endpoint gets.
class Verdict(BaseModel):  # noqa: D101
    keep: bool
    reason: str = ""


class Guess(BaseModel):  # noqa: D101
    range: Range


async def curate(settings: llm.Settings, source: str, out: Path) -> tuple[list[Query], list[dict]]:
    """Queries kept, in the order of the source, and rejects {id, query, reason, detail}; at the end they are written to `out`
    and to `.rejects.jsonl` beside it. The replies in `.replies.jsonl` make it resumable. `source`: as for `load_queries`, but
    only `query` is needed; of a `conversation`, as in WildChat-1M and LMSYS-Chat-1M, the first turn is the query.
    Raises DataError, llm.LLMError and RunError."""
    replies = out.with_suffix(".replies.jsonl")
    if out.exists() and not replies.exists():
        raise DataError(f"{out} is there and was not made by curate; remove it, or give another name")
    worthy, kept, rejects, spent = [], [], [], llm.Spent()

    async def judged(prompts, answer, queries, title):
        requests = [llm.Request(prompts[language_of(query.query)].replace("{query}", query.query), answer) for query in queries]
        for query, reply in zip(queries, await llm.ask(requests, settings, replies, spent, title), strict=True):
            if isinstance(reply, llm.NoAnswer):
                rejects.append(_reject(query.id, query.query, "no valid answer", reply))
            else:
                yield query, reply

    async for query, verdict in judged(FILTER, Verdict, _read(source, rejects), "filter"):
        if verdict.keep:
            worthy.append(query)
        else:
            rejects.append(_reject(query.id, query.query, "needs no long writing", verdict.reason))
    async for query, guess in judged(RANGE, Guess, worthy, "range"):
        word_range = enforce(guess.range[0], guess.range[1], query.query)
        if isinstance(word_range, str):
            rejects.append(_reject(query.id, query.query, word_range, f"predicted {list(guess.range)}"))
        else:
            kept.append(query.model_copy(update={"word_range": word_range}))
    write_rows(out, [query.model_dump() for query in kept])
    write_rows(out.with_suffix(".rejects.jsonl"), rejects)
    return kept, rejects


def _reject(name: str, query: str, reason: str, detail: str) -> dict:
    return {"id": name, "query": query, "reason": reason, "detail": detail}


def _read(source: str, rejects: list[dict]) -> list[Query]:
    """Queries of the source, each once; rows that hold none, and repeats, go to `rejects`."""
    queries, seen = [], {}
    for place, row in rows_of(source):
        try:
            query = _query(place, row)
        except (DataError, LookupError, TypeError) as error:
            rejects.append(_reject(place, "", "not a query", str(error)[:500]))
            continue
        marks = query.id, "query " + fold(query.query)
        if repeated := seen.keys() & marks:
            rejects.append(_reject(query.id, query.query, "repeated", f"see {seen[repeated.pop()]}"))
        else:
            seen |= dict.fromkeys(marks, place)
            queries.append(query)
    return queries


def _query(place: str, row) -> Query:
    if not isinstance(row, dict):
        raise DataError(f"{place}: {row!r:.100} is not a row with a query")
    turns = row.get("conversation")
    text = turns[0]["content"] if turns else row.get("query")
    known = {name: row[name] for name in ("language", "domain", "type") if name in row and not turns}
    return validated(place, {"id": row.get("id") or hashlib.sha256(f"{text}".encode("utf-8", "replace")).hexdigest()[:16],
                             "query": text, "word_range": (1, 1)} | known, Query)
