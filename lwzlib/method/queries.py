"""Queries with the word range that each asks for.

The paper takes its RL queries from WildChat-1M and LMSYS-Chat-1M; QwQ-32B predicted the ranges. The kit ships its own (252 for
training, 72 held out; English and Chinese 2:1; the six WritingBench domains), with ranges set by hand, and two variants of each
for small models: `short`, of one paragraph, and `lengths`, of one to eight sentences or one to three paragraphs. Of these the
ranges are measured: half of SmolLM2-135M-Instruct's sentences have 15 to 26 words (of 344), half of its single paragraphs 60 to
90 (of 16), half of the sentences in the kit's Chinese texts 9 to 23 (of 552; a paragraph is four of them).
"""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lwzlib.base.rows import DataError, rows_of, validated
from lwzlib.method.text import answer_language

DOMAINS = {"D1": "Academic & Engineering", "D2": "Finance & Business", "D3": "Politics & Law",
           "D4": "Literature & Arts", "D5": "Education", "D6": "Advertising & Marketing"}


class Query(BaseModel):
    """One writing request. `word_range`: 0 < lower <= upper <= 12000, in words; `language` is that of the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1)
    query: str = Field(pattern=r"\S")
    word_range: tuple[int, int]
    language: str = Field(pattern="^(en|zh)$", default_factory=lambda row: answer_language(row["query"]))
    domain: str = Field(default="unknown", pattern="^(D[1-6]|unknown)$")
    type: str = "unknown"

    @model_validator(mode="after")
    def _bounds(self):
        lower, upper = self.word_range
        if not 0 < lower <= upper <= 12000:
            raise ValueError(f"word_range [{lower}, {upper}] must satisfy 0 < lower <= upper <= 12000")
        return self


def load_queries(source: str, languages: Iterable[str] = ("en", "zh")) -> list[Query]:
    """Queries from `kit:<name>` (train, heldout, and either with _short or _lengths), a JSONL file, or `hub:<dataset>`.

    Raises DataError at the first row that breaks the schema, at a repeated id, or if no query is left.
    """
    languages, seen, queries = set(languages), {}, []
    for place, row in rows_of(source):
        query = validated(place, row, Query)
        if query.id in seen:
            raise DataError(f"{place}: id {query.id!r} was already used at {seen[query.id]}; ids must be unique")
        seen[query.id] = place
        if query.language in languages:
            queries.append(query)
    if not queries:
        raise DataError(f"{source} has no query in {', '.join(sorted(languages))}")
    return queries
