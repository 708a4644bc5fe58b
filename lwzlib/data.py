"""Queries with the word range that each asks for.

The paper takes its RL queries from WildChat-1M and LMSYS-Chat-1M and lets QwQ-32B predict the ranges. The kit ships
queries of its own (252 for training, 72 held out; English and Chinese 2:1; the six WritingBench domains), written for
it, with ranges set by hand, and a short variant of each for models that can only write a paragraph.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lwzlib.recipe import Recipe
from lwzlib.text import language_of

QUERIES = Path(__file__).parent / "queries"
DOMAINS = {"D1": "Academic & Engineering", "D2": "Finance & Business", "D3": "Politics & Law",
           "D4": "Literature & Art", "D5": "Education", "D6": "Advertising & Marketing"}


_MIB = 2**20


class DataError(ValueError):
    """Queries that cannot be used; the message names the file, the line, the field and what would be right."""


class Query(BaseModel):
    """One writing request. `word_range` is [lower, upper] in words, 0 < lower <= upper <= 12000."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1)
    query: str = Field(pattern=r"\S")
    word_range: tuple[int, int]
    language: str = Field(pattern="^(en|zh)$")
    domain: str = Field(default="unknown", pattern="^(D[1-6]|unknown)$")
    type: str = "unknown"

    @model_validator(mode="before")
    @classmethod
    def _language(cls, row):
        if isinstance(row, dict) and isinstance(row.get("query"), str):
            return {"language": language_of(row["query"])} | row
        return row

    @model_validator(mode="after")
    def _bounds(self):
        lower, upper = self.word_range
        if not 0 < lower <= upper <= 12000:
            raise ValueError(f"word_range [{lower}, {upper}] must satisfy 0 < lower <= upper <= 12000")
        return self


def load(source: str, languages: Iterable[str] = ("en", "zh")) -> list[Query]:
    """Queries from `kit:<name>` (train, heldout, train_short, heldout_short), a JSONL file, or `hub:<dataset>`.

    Raises DataError at the first row that breaks the schema, at a repeated id, or if no query is left.
    """
    languages, seen, queries = set(languages), {}, []
    for place, row in rows_of(source):
        query = validated(place, row)
        if query.id in seen:
            raise DataError(f"{place}: id {query.id!r} was already used at {seen[query.id]}; ids must be unique")
        seen[query.id] = place
        if query.language in languages:
            queries.append(query)
    if not queries:
        raise DataError(f"{source} has no query in {', '.join(sorted(languages))}")
    return queries


def of_recipe(recipe: Recipe) -> list[Query]:
    """The training queries of a recipe, then the held-out ones. Raises DataError where they do not fit its settings."""
    asked = {source: load(source, recipe.data.languages) for source in (recipe.data.train, recipe.data.heldout)}
    train, step, longest = asked[recipe.data.train], recipe.grpo.queries_per_step, recipe.reward.length.max_words
    if len(train) < step and any(arm.algorithm == "grpo" for arm in recipe.arms.values()):
        raise DataError(f"{recipe.data.train} has {len(train)} queries, and a step takes grpo.queries_per_step = {step}")
    for source, queries in asked.items():
        for query in queries if recipe.reward.weights.length else []:
            if query.word_range[1] >= longest:
                raise DataError(f"{source}, query {query.id!r}: word_range {list(query.word_range)} must end below "
                                f"reward.length.max_words = {longest}")
    seen = {query.query: query.id for query in train}
    if both := next((query for query in asked[recipe.data.heldout] if query.query in seen), None):
        raise DataError(f"{recipe.data.heldout}, query {both.id!r} is also trained on (query {seen[both.query]!r} of "
                        f"{recipe.data.train}): held-out queries must be others")
    return [*train, *asked[recipe.data.heldout]]


def digest_of(path: str | Path) -> str:
    """Hex digest of a file, or of a folder's files but hidden ones: names, sizes, and of the first 64 the first and the last
    MiB, so that even weights and corpora take no time."""
    found, root = hashlib.sha256(), Path(path)
    files = [file for file in ([root] if root.is_file() else sorted(root.rglob("*"))) if file.is_file()
             and not any(part.startswith(".") for part in file.relative_to(root).parts)]  # a download keeps notes of its own
    for i, file in enumerate(files):
        size = file.stat().st_size
        found.update(f"{file.relative_to(root)} {size}\n".encode())
        if i < 64:
            with file.open("rb") as content:
                found.update(content.read(_MIB))
                content.seek(max(size - _MIB, _MIB))
                found.update(content.read(_MIB))
    return found.hexdigest()[:16]


def validated(place: str, row, kind: type[BaseModel] = Query):
    """The row as a `kind`; a DataError names the place, the field and what is wrong."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        shown = "" if problem["type"] == "missing" or not field else f" = {problem['input']!r:.200}"
        raise DataError(f"{place}: {field}{shown}: {problem['msg']}".replace(": : ", ": ")) from None


def rows_of(source: str, part: int = 0, parts: int = 1):
    """(where it stands, row) for each row of a JSONL file, `kit:<name>` or `hub:<dataset>`, or for one of `parts` shares of
    them, without reading the others' content; DataError if there is no such file or dataset."""
    if source.startswith("hub:"):
        from datasets import load_dataset

        try:
            rows = load_dataset(source.removeprefix("hub:"), split="train")
        except Exception as error:  # the hub raises many kinds; each means that the data are not to be had
            raise DataError(f"cannot load {source}: {type(error).__name__}: {error}. It needs network and the hub; "
                            "`kit:train` needs neither") from error
        yield from ((f"{source}, row {i}", rows[i]) for i in range(part, len(rows), parts))
        return
    path = QUERIES / f"{source.removeprefix('kit:')}.jsonl" if source.startswith("kit:") else Path(source)
    if not path.is_file():
        kit = ", ".join(f"kit:{p.stem}" for p in sorted(QUERIES.glob("*.jsonl")))
        raise DataError(f"no file {source}; give a .jsonl file, hub:<dataset>, or one of {kit}")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number % parts == (part + 1) % parts and line.strip():
                yield f"{path}, line {number}", _json(f"{path}, line {number}", line)


def _json(place: str, line: bytes):
    try:
        return json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise DataError(f"{place}: not JSON: {error}") from None
