"""What the benchmarks have in common: rows under an index, the text that is judged, asking the judge."""

import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field

from lwzlib.base.rows import DataError, rows_of, validated, write_rows
from lwzlib.endpoints import llm
from lwzlib.method.text import parse

MATERIAL = """<request>
{query}
</request>

<response>
{response}
</response>"""  # for a judge


class Indexed(BaseModel):
    """A row that names its prompt: `index` is the prompt's number in the benchmark."""

    index: int = Field(strict=True)


Row = TypeVar("Row", bound=Indexed)


class Response(Indexed):
    """A row of a file of responses: what a model wrote for one prompt, plan and tags included."""

    response: str


def indexed(source: str | Path, kind: type[Row], known=None) -> dict[int, tuple[str, Row]]:
    """{index: (where it stands, row)}, in order. `known`: the benchmark, or None to read one.

    Raises DataError, which names file, line and field, for a row that is not of that kind, an index that comes twice, one
    that the benchmark lacks, or no row at all.
    """
    found = {}
    for place, row in rows_of(str(source)):
        row = validated(place, row, kind)
        if row.index in found:
            raise DataError(f"{place}: index {row.index} was already used at {found[row.index][0]}; each comes once")
        if known is not None and row.index not in known:
            raise DataError(f"{place}: index {row.index} is not in the benchmark")
        found[row.index] = place, row
    if not found:
        raise DataError(f"{source} has no row")
    return found


def responses(source: str | Path, bench) -> dict[int, str]:
    """{index: response} of a file of `{index, response}` rows. Raises DataError as `indexed` does."""
    return {index: row.response for index, (_, row) in indexed(source, Response, bench).items()}


def written(response: str) -> str:
    """What the model hands in: the text after the first closing think tag, and of that what stands in `<answer>`, where
    these tags are; else the response as it is.

    >>> written("<think>First the sea.</think>\\n\\n<answer>The sea.</answer>")
    'The sea.'
    """
    _, closed, after = response.partition("</think>")
    text = after.lstrip() if closed else response
    return parse(text, "direct").answer if "<answer>" in text else text


def filled(template: str, **fields: str) -> str:
    """The template with each {field} replaced, in one pass: a brace in a query or a response stays what it is."""
    return re.sub("{(" + "|".join(fields) + ")}", lambda match: fields[match[1]], template)


async def judged(settings: llm.Settings, sampling: dict, asked: dict, out: Path, title: str) -> tuple[dict, list[dict]]:
    """({what: answer}, a row for each that has no valid one). `asked`: {a tuple of index and whatever else: Request}.

    The protocol's sampling holds where the settings name no other. The replies in `.replies.jsonl` beside `out` make it
    resumable; the rows go to `.missing.jsonl`. Raises DataError, llm.LLMError, RunError.
    """
    replies = out.with_suffix(".replies.jsonl")
    if out.exists() and not replies.exists():
        raise DataError(f"{out} is there and was not made by this judge; remove it, or give another name")
    settings = settings.model_copy(update={"sampling": sampling | settings.sampling})
    said = dict(zip(asked, await llm.ask(list(asked.values()), settings, replies, title=title), strict=True))
    missing = [{"asked": list(what), "why": str(answer)} for what, answer in said.items() if isinstance(answer, llm.NoAnswer)]
    write_rows(out.with_suffix(".missing.jsonl"), missing)
    return {what: answer for what, answer in said.items() if not isinstance(answer, llm.NoAnswer)}, missing
