"""Files of a judge of writing: what it is asked, the criteria of each query, the reference answers."""

import functools
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, RootModel, model_validator

from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import DataError, read_text, read_yaml, rows_of, validated
from lwzlib.evaluate.common import filled, judge_prompts
from lwzlib.evaluate.writingbench import Criterion, Rubric
from lwzlib.method.queries import Query
from lwzlib.method.text import language_of

KIT_PROMPTS = {"kit:rubric": "writingbench", "kit:critic": "critic", "kit:pairwise": "arena"}
KIT_CRITERIA = "kit:criteria"
FIELDS = {"rubric": ("query", "response", "criterion"), "pairwise": ("request", "first", "second")}
Template = str | dict[Literal["system", "user"], str]
Prompts = dict[str, Template]  # by language, `en` and `zh`


class _Prompts(RootModel[dict[Literal["en", "zh"], Template]]):
    pass


class _OfQuery(BaseModel):
    id: str | None = None
    query: str | None = None

    @model_validator(mode="after")
    def _named(self):
        if not (self.id or self.query):
            raise ValueError("it must say whose it is, by `query` or by `id`")
        return self


class _Criteria(_OfQuery, Rubric):
    pass


class _Reference(_OfQuery):
    answer: str = Field(pattern=r"\S")


Row = TypeVar("Row", bound=_OfQuery)


def read_prompts(source: str, judge: str) -> Prompts:
    """What a judge (rubric or pairwise) is asked in each language: `kit:rubric`, `kit:critic`, `kit:pairwise`, or a YAML file
    {en: ..., zh: ...} of texts, or of {system: ..., user: ...}. Raises DataError, also where a field is missing."""
    content = judge_prompts(KIT_PROMPTS[source]) if source in KIT_PROMPTS else _read_file(source)
    prompts = validated(source, content, _Prompts).root
    for language, template in prompts.items():
        text = template if isinstance(template, str) else "".join(template.values())
        if missing := [f"{{{name}}}" for name in FIELDS[judge] if f"{{{name}}}" not in text]:
            fitting = "kit:pairwise" if judge == "pairwise" else "kit:rubric or kit:critic"
            raise DataError(f"reward.writing.prompts: {source}, {language} lacks {', '.join(missing)}, which judge: {judge} "
                            f"fills in; of the kit take {fitting}")
    return prompts


def _read_file(source: str):
    if source.startswith("kit:") or not Path(source).is_file():
        raise DataError(f"reward.writing.prompts: no file {source}; give a YAML file, or one of {', '.join(KIT_PROMPTS)}")
    try:
        return yaml.safe_load(read_text(source))
    except yaml.YAMLError as error:
        raise DataError(f"reward.writing.prompts: {source} is not YAML: {error}") from None


def messages(prompts: Prompts, query: str, /, **fields: str) -> str | tuple[tuple[str, str], ...]:
    """The prompt in the language of the query, with its fields filled in. Raises DataError if there is none."""
    language = language_of(query)
    if language not in prompts:
        raise DataError(f"reward.writing.prompts has no prompt in {language}, the language of the query {query[:80]!r}")
    template = prompts[language]
    if isinstance(template, str):
        return filled(template, **fields)
    return tuple((role, filled(text, **fields)) for role, text in template.items())


@functools.cache
def kit_criteria() -> dict[str, list[Criterion]]:
    """The kit's criteria for any text, by language."""
    content = read_yaml(TEXTS / "criteria.yaml")
    return {language: validated(KIT_CRITERIA, {"checklist": rows}, Rubric).checklist for language, rows in content.items()}


def read_criteria(source: str, queries: list[Query]) -> dict[str, list[Criterion]]:
    """Criteria by query, from a JSONL file or `hub:<dataset>` of rows {id or query, checklist or criteria} as WritingBench's;
    those of the kit by language. Raises DataError at the first row that is not right."""
    if source == KIT_CRITERIA:
        return kit_criteria()
    return {query: row.checklist for query, row in _by_query(source, _Criteria, queries).items()}


def read_references(source: str, queries: list[Query]) -> dict[str, str]:
    """Reference answers by query, of rows {id or query, answer}. Raises DataError at the first row that is not right."""
    return {query: row.answer for query, row in _by_query(source, _Reference, queries).items()}


def _by_query(source: str, kind: type[Row], queries: list[Query]) -> dict[str, Row]:
    """Rows by the text of their query; an `id` is that of one of `queries`, and a row for none of them is left out."""
    texts: dict[str, list[str]] = {}
    for query in queries:
        texts.setdefault(query.id, []).append(query.query)
    rows: dict[str, Row] = {}
    for place, content in rows_of(source):
        row = validated(place, content, kind)
        if not row.query and len(set(texts.get(row.id or "", []))) > 1:
            raise DataError(f"{place}: {row.id!r} is the id of two queries, one to train on and one held out: give "
                            "`query`, its text, in the place of `id`")
        for text in [row.query] if row.query else texts.get(row.id or "", []):
            if text in rows:
                raise DataError(f"{place}: there is a row before for the query {text[:80]!r}; each has one")
            rows[text] = row
    if not rows:
        raise DataError(f"{source} has no row for any query of the recipe")
    return rows
