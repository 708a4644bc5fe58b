"""What the benchmarks have in common: rows under an index, the text that is judged, prompts for judges, asking them."""

import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field

from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import DataError, read_yaml, rows_of, validated, write_rows
from lwzlib.endpoints import llm
from lwzlib.method.text import parse


class Indexed(BaseModel):
    """A row with the number of its prompt in the benchmark."""

    index: int = Field(strict=True)


class Response(Indexed):
    """A row of a file of responses: what a model wrote for one prompt, plan and tags included."""

    response: str


Row = TypeVar("Row", bound=Indexed)
Judgment = TypeVar("Judgment", bound=BaseModel)


def judge_prompts(evaluation: str) -> dict[str, str]:
    """{`en` or `zh`: prompt with {fields}} of `arena`, `longbench` or `writingbench`, worded by this kit."""
    return read_yaml(TEXTS / "judge_prompts.yaml")[evaluation]


def filled(template: str, **fields: str) -> str:
    """The template with each {field} replaced, in one pass: a brace in a query or a response stays what it is."""
    return re.sub("{(" + "|".join(fields) + ")}", lambda match: fields[match[1]], template)


def read_indexed(source: str | Path, kind: type[Row], known=None, notes: list[str] | None = None) -> dict[int, tuple[str, Row]]:
    """{index: (its place in the file, row)}, in order. `known`: the benchmark, or None to read one. With `notes` the later row
    of an index that comes twice holds, and a note says so: a run of the authors' scripts that was resumed writes such files.

    Raises DataError, which names file, line and field, for a row that is not of that kind, an index that comes twice, one
    that the benchmark lacks, or no row at all.
    """
    rows = {}
    for place, content in rows_of(str(source)):
        row = validated(place, content, kind)
        if row.index in rows:
            repeated = f"{place}: index {row.index} was already used at {rows[row.index][0]}"
            if notes is None:
                raise DataError(f"{repeated}; each comes once")
            notes.append(f"{repeated}; the later row holds")
        if known is not None and row.index not in known:
            raise DataError(f"{place}: index {row.index} is not in the benchmark")
        rows[row.index] = place, row
    if not rows:
        raise DataError(f"{source} has no row")
    return rows


def read_responses(source: str | Path, bench) -> dict[int, str]:
    """{index: response} of a file of `{index, response}` rows, `with_openings`. Raises DataError as `read_indexed` does."""
    return with_openings({index: row.response for index, (_, row) in read_indexed(source, Response, bench).items()})


def with_openings(texts: dict) -> dict:
    """Texts of one model, by any key. If most close a plan that they do not open, the chat template opened it: each text
    without `<think>` then gets one, even a plan that never ends.

    >>> with_openings({1: "plan</think>Rain.", 2: "plan</think>Snow.", 3: "a plan that never ends"})[3]
    '<think>a plan that never ends'
    """
    closing = sum("</think>" in text and "<think>" not in text for text in texts.values())
    opened = 2 * closing > len(texts)
    return {key: f"<think>{text}" if opened and "<think>" not in text else text for key, text in texts.items()}


def judged_text(response: str) -> str:
    """Text after the first closing think tag, and of that what stands in `<answer>`, where these tags are; else the response;
    "" if its plan never ends.

    >>> judged_text("<think>First the sea.</think>\\n\\n<answer>The sea.</answer>"), judged_text("<think>First the sea.")
    ('The sea.', '')
    """
    _, closed, after = response.partition("</think>")
    text = after.lstrip() if closed else response
    if text.lstrip().startswith("<think>"):
        return ""
    return parse(text, "direct").answer if "<answer>" in text else text


async def ask_judge(settings: llm.Settings, sampling: dict, prompts: dict, kind: type[Judgment], samples: int,
                    out: Path) -> tuple[dict[tuple, list[Judgment]], list[dict]]:
    """({key: its valid judgments}, a row {asked: [*key, sample], why} for each that is not valid): `samples` judgments of each
    prompt of `prompts`, whose keys are tuples.

    The protocol's sampling holds where the settings name no other. The replies in `.replies.jsonl` beside the score file
    `out` make it resumable; the rows go to `.missing.jsonl`. Raises DataError, llm.LLMError, RunError.
    """
    cache = out.with_suffix(".replies.jsonl")
    if out.exists() and not cache.exists():
        raise DataError(f"{out} is there and was not made by this judge; remove it, or give another name")
    settings = settings.model_copy(update={"sampling": sampling | settings.sampling})
    keys = [(key, sample) for key in prompts for sample in range(samples)]
    requests = [llm.Request(prompts[key], kind, sample) for key, sample in keys]
    judgments, missing = {}, []
    for (key, sample), reply in zip(keys, await llm.ask(requests, settings, cache, title="judged"), strict=True):
        if isinstance(reply, llm.NoAnswer):
            missing.append({"asked": [*key, sample], "why": str(reply)})
        else:
            judgments.setdefault(key, []).append(reply)
    write_rows(out.with_suffix(".missing.jsonl"), missing)
    return judgments, missing
