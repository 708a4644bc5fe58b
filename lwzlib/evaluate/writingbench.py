"""WritingBench (arXiv 2503.05244, github.com/X-PLUG/WritingBench, whose files a user brings: the kit ships none of them).

There are two versions: the first (March 2025; 1,239 queries, whose rows say `criteria`) and the present one (since April 2025;
1,000 queries, `checklist`, another judging prompt). Both are read; their scores do not compare. The paper's 8.69 seems to be
of the first: its 8.55 of DeepSeek-R1 and 8.37 of Qwen-Max are WritingBench's own numbers of March 2025.

Published: 1,000 queries, five criteria each, a judge's integer 1-10 for each criterion; sampling of the writer and of the
judge; how scores aggregate; the leaderboard shows ten times the score. Text up to a closing think tag is not judged.

Departures: the wording of the judge's prompts is this kit's, in English or Chinese like the query, so scores do not compare
with the leaderboard's (`judge_responses` takes other prompts). A judgment that cannot be had stays missing and is counted,
where the authors' script stops. A `</think>` counts also without the blank line that their script wants after it, and
`<answer>` tags, the form that this paper trains, are taken off.
Not published, our choice: an empty or truncated response is judged as it stands, like any other, and a plan that never ends
as an empty one.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import AliasChoices, BaseModel, Field, field_validator

from lwzlib.base.quantities import Decoding
from lwzlib.base.rows import DataError, write_rows
from lwzlib.endpoints import llm
from lwzlib.endpoints.replies import Whole
from lwzlib.evaluate import common, intervals
from lwzlib.evaluate.common import Indexed, read_indexed
from lwzlib.method.text import language_of

JUDGE = common.judge_prompts("writingbench")
JUDGE_SAMPLING = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 2_048}
DECODING = Decoding(temperature=0.7, top_p=0.8, top_k=20, max_new_tokens=16_000)
_CHECKLIST = AliasChoices("checklist", "criteria")
REQUIREMENTS = ("style", "format", "length")


class Named(BaseModel):
    """A criterion, known by its name alone."""

    name: str = Field(min_length=1)


class Criterion(Named):
    """A criterion with what is judged, and what earns a score in each band."""

    criteria_description: str
    worst: str = Field(alias="1-2")
    poor: str = Field(alias="3-4")
    middling: str = Field(alias="5-6")
    good: str = Field(alias="7-8")
    best: str = Field(alias="9-10")

    def __str__(self) -> str:
        fields = self.model_dump(by_alias=True)
        heading = f"{fields.pop('name')}: {fields.pop('criteria_description')}"
        return "\n".join([heading, *(f"{band}: {text}" for band, text in fields.items())])


class Own(Indexed):
    """A row of a requirement's `_subset_C.jsonl`: which of the query's criteria are about that requirement."""

    checklist: list[Named] = Field(validation_alias=_CHECKLIST)


class Rubric(BaseModel):
    """What a text is judged by: criteria of different names."""

    checklist: list[Criterion] = Field(min_length=1, validation_alias=_CHECKLIST)

    @field_validator("checklist")
    @classmethod
    def _names_differ(cls, criteria):
        if len({criterion.name for criterion in criteria}) < len(criteria):
            raise ValueError("two criteria have the same name")
        return criteria


class _Asked(Indexed):
    domain1: str | None = None
    domain2: str | None = None
    lang: str | None = None
    query: str = Field(min_length=1)


class Item(Rubric, _Asked):
    """A row of the benchmark. `lang`, where the file has it, outranks what the query looks like."""

    @property
    def language(self) -> str:
        """`en` or `zh`: that of the judge's prompt, and the part of the table in which the query counts."""
        return self.lang if self.lang in ("en", "zh") else language_of(self.query)

    @property
    def names(self) -> list[str]:
        """Names of its criteria."""
        return [criterion.name for criterion in self.checklist]


class Judgment(BaseModel):  # noqa: D101  # a docstring would stand in the JSON schema that an endpoint gets
    score: Annotated[int, Whole, Field(strict=True, ge=1, le=10)]
    reason: str


Judgments = dict[str, Annotated[list[Judgment], Field(min_length=1)]]  # by criterion; what is missing is not there


class Scored(Indexed):
    """A row of a score file: the judgments of one response, by criterion."""

    scores: Judgments = Field(min_length=1)


def read_benchmark(source: str | Path) -> dict[int, Item]:
    """{index: Item} of a benchmark file, or `hub:<dataset>`, in its order. Raises DataError."""
    return {index: item for index, (_, item) in read_indexed(source, Item).items()}


def read_scores(source: str | Path, bench: dict[int, Item], notes: list[str] | None = None) -> dict[int, Judgments]:
    """{index: judgments by criterion} of a score file. With `notes` the later row of an index holds. Raises DataError, also for
    a criterion that the query has not."""
    rows = read_indexed(source, Scored, bench, notes)
    for index, (place, row) in rows.items():
        _check_names(place, row.scores, bench[index])
    return {index: row.scores for index, (_, row) in rows.items()}


def read_requirements(folder: str | Path, bench: dict[int, Item]) -> dict[str, dict[int, list[str]]]:
    """{requirement: {index of a query that makes it: names of the criteria about it}}, without what `bench` lacks, of the
    files `<name>/<name>_subset.jsonl` and `<name>/<name>_subset_C.jsonl` for style, format and length. Raises DataError."""
    requirements = {}
    for requirement in REQUIREMENTS:
        path = Path(folder) / requirement / f"{requirement}_subset.jsonl"
        criteria, names = read_indexed(path.with_stem(f"{requirement}_subset_C"), Own), {}
        for index, (place, _) in read_indexed(path, Indexed).items():
            if index not in criteria:
                raise DataError(f"{place}: index {index} is not in {requirement}_subset_C.jsonl, which has its criteria")
            if index in bench:
                place, row = criteria[index]
                names[index] = [criterion.name for criterion in row.checklist]
                _check_names(place, names[index], bench[index])
        requirements[requirement] = names
    return requirements


def _check_names(place: str, names: Iterable[str], item: Item) -> None:
    if unknown := [name for name in names if name not in item.names]:
        known = ", ".join(map(repr, item.names))
        raise DataError(f"{place}: query {item.index} has no criterion {unknown[0]!r}; it has {known}")


def notes_on(bench: dict[int, Item], judgments: dict[int, Judgments]) -> list[str]:
    """What was done where the files leave something open: criteria without a judgment, queries without a stated language."""
    total = sum(len(item.checklist) for item in bench.values())
    missing = total - sum(len(own) for own in judgments.values())
    unstated = sum(item.lang not in ("en", "zh") for item in bench.values())
    notes = [f"{missing:,} of {total:,} criteria have no judgment: they are left out of every sum and mean"] if missing else []
    if unstated:
        notes.append(f"no language is stated for {unstated:,} of {len(bench):,} queries: that of most of the text counts")
    return notes


def write_scores(path: Path, bench: dict[int, Item], judgments: dict[int, Judgments]) -> None:
    """A score file in the order of the benchmark, which the authors' scripts read. What is missing is left out: a criterion,
    or a whole query, never an empty list, by whose length they would divide."""
    rows = []
    for index, item in bench.items():
        scores = {name: judgments[index][name] for name in item.names if judgments.get(index, {}).get(name)}
        if scores:
            rows.append(Scored(index=index, scores=scores).model_dump())
    write_rows(path, rows)


async def judge_responses(settings: llm.Settings, bench: dict[int, Item], responses: dict[int, str], out: Path,
                          samples: int = 1, prompts: dict[str, str] = JUDGE) -> tuple[dict[int, Judgments], list[dict]]:
    """({index: `samples` judgments for each criterion}, rows of those without a valid answer), and the score file `out`; see
    `common.ask_judge`.

    `prompts`: by language, with {query}, {response} and {criterion}; what it asks for is JSON valid as `Judgment`. Resumes;
    raises DataError, llm.LLMError and RunError.
    """
    filled = {}
    for index, item in bench.items():
        if index in responses:
            text = common.judged_text(responses[index])
            for criterion in item.checklist:
                filled[index, criterion.name] = common.filled(prompts[item.language], query=item.query, response=text,
                                                              criterion=str(criterion))
    by_key, missing = await common.ask_judge(settings, JUDGE_SAMPLING, filled, Judgment, samples, out)
    judgments = {}
    for (index, name), scores in by_key.items():
        judgments.setdefault(index, {})[name] = scores
    write_scores(out, bench, judgments)
    return judgments, missing


# The score of a part is a sum / a count over its queries. What a query adds, given the (sum, count) of each judged criterion:
_ADDED: dict[str, Callable[[list[tuple[int, int]]], tuple[float, int]]] = {
    "scores": lambda criteria: (sum(total for total, _ in criteria), sum(count for _, count in criteria)),
    "means of queries": lambda criteria: (sum(total for total, _ in criteria) / sum(count for _, count in criteria), 1),
    "means of criteria": lambda criteria: (sum(total / count for total, count in criteria), len(criteria))}


def score_table(bench: dict[int, Item], judgments: dict[int, Judgments],
                required: dict[str, dict[int, list[str]]] | None = None, resamples: int = 5000) -> pd.DataFrame:
    """A row for each part of the benchmark that has a query, in all languages and in each.

    language (all, en, zh), scope (overall, domain1, domain2, style R, style C, ...), name, of (queries of the benchmark),
    queries (those with a judgment), missing (criteria without one), score (1-10; NaN if there is none), leaderboard (ten
    times the score), low and high (95% bootstrap interval of the score over queries).

    With several judgments of a criterion each counts: overall = sum of all scores / their count; a domain, or a requirement's
    R = mean of its queries' means; C = mean over the criteria about that requirement, each the mean of its judgments.
    """
    rows = []
    for language in ("all", *sorted({item.language for item in bench.values()})):
        items = {index: item for index, item in bench.items() if language in ("all", item.language)}
        for scope, name, names, unit in _parts(items, required or {}):
            judged = {index: _sums(judgments.get(index, {}), names[index]) for index in names}
            added = [_ADDED[unit](criteria) for criteria in judged.values() if criteria]
            sums, counts = zip(*added, strict=True) if added else ((), ())
            score, low, high = intervals.bootstrap_ratio(sums, counts, resamples)
            rows.append({"language": language, "scope": scope, "name": name, "of": len(names), "queries": len(added),
                         "missing": sum(len(names[index]) - len(judged[index]) for index in names), "score": score,
                         "leaderboard": 10 * score, "low": low, "high": high})
    return pd.DataFrame(rows)


def _sums(judgments: Judgments, names: list[str]) -> list[tuple[int, int]]:
    """(sum, count) of the scores of each of these criteria that was judged."""
    sums = []
    for name in names:
        if scores := [judgment.score for judgment in judgments.get(name, [])]:
            sums.append((sum(scores), len(scores)))
    return sums


def _parts(bench: dict[int, Item], required: dict[str, dict[int, list[str]]]):
    """(scope, name, {index: names of the criteria that count}, what the score is a mean of: a key of `_ADDED`)."""
    names = {index: item.names for index, item in bench.items()}
    yield "overall", "all", names, "scores"
    for scope in ("domain1", "domain2"):
        domains: dict[str | None, dict[int, list[str]]] = {}
        for index, item in bench.items():
            domains.setdefault(getattr(item, scope), {})[index] = names[index]
        yield from ((scope, name, members, "means of queries") for name, members in domains.items() if name is not None)
    for name, criteria_of in required.items():
        own = {index: criteria for index, criteria in criteria_of.items() if index in bench}
        yield f"{name} R", name, {index: names[index] for index in own}, "means of queries"
        yield f"{name} C", name, own, "means of criteria"
