"""LongBench-Write (LongWriter, arXiv 2408.07055): 120 prompts, each with the number of words that it asks for.

Published: S_l scores the length, S_q the quality (a judge gives six dimensions 1-5, the length set aside), S is their mean;
the authors judge at temperature 0.5 and 1,024 tokens, leave failed judgments out, and show the prompts in four classes of
required length. Their script samples at temperature 0.5, with up to 32,768 new tokens: ten prompts ask for 10,000 to 20,000
words. Words are counted as they count them (`count_published_words`), not as the length reward does, which is harder to cheat.

Departures: the wording of the judge's prompts is this kit's; missing judgments are counted. Words are counted on the answer
only, as this paper does. Not published, our choice: a plan that never ends is no answer (0 words); an empty or truncated
answer is judged as it stands.
"""

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field

from lwzlib.base import models
from lwzlib.base.kit import LONGBENCH
from lwzlib.base.quantities import Decoding
from lwzlib.base.rows import DataError, rows_of, validated, write_rows
from lwzlib.endpoints import llm
from lwzlib.endpoints.replies import Whole
from lwzlib.evaluate import common, intervals
from lwzlib.method.text import language_of

JUDGE = common.judge_prompts("longbench")
JUDGE_SAMPLING = {"temperature": 0.5, "max_tokens": 1_024}
_HAN, _LATIN_WORD = re.compile("[\u4e00-\u9fff]"), re.compile(r"\b[a-zA-Z]+\b")
CLASSES = {"below 500 words": 500, "500 to 1,999": 2_000, "2,000 to 3,999": 4_000, "4,000 and more": float("inf")}
DECODING = Decoding(temperature=0.5, top_p=1.0, max_new_tokens=32_768)
Grade = Annotated[int, Whole, Field(strict=True, ge=1, le=5)]


class Item(BaseModel):
    """A row of the benchmark: a prompt, its genre, and the words it asks for, which the file calls `length`."""

    prompt: str = Field(min_length=1)
    type: str
    required_words: int = Field(strict=True, gt=0, alias="length")

    @property
    def language(self) -> str:
        """`en` or `zh`."""
        return language_of(self.prompt)


class Quality(BaseModel):  # its docstring stands in the JSON schema that a judge gets, and so in the key of a kept reply
    """One judgment: six integers, 1-5."""

    analysis: str = ""
    relevance: Grade
    accuracy: Grade
    coherence: Grade
    clarity: Grade
    breadth_and_depth: Grade
    reading_experience: Grade


DIMENSIONS = tuple(Quality.model_fields)[1:]


class Scored(common.Indexed):
    """A row of a score file: the judgments of one response."""

    scores: list[Quality] = Field(min_length=1)


def read_benchmark(source: str = LONGBENCH) -> dict[int, Item]:
    """{position in the file, from 0: Item} of the prompts that `lwz prepare` fetched, a JSONL file with prompt, type and
    length, or `hub:<dataset>`. Raises DataError and ModelError."""
    if source == LONGBENCH:
        source = str(Path(models.resolve(source)) / "longbench_write.jsonl")
    items = [validated(place, row, Item) for place, row in rows_of(source)]
    if not items:
        raise DataError(f"{source} has no row")
    return dict(enumerate(items))


def read_scores(source: str | Path, bench: dict[int, Item], notes: list[str] | None = None) -> dict[int, list[Quality]]:
    """{index: judgments} of a file of `{index, scores: [{relevance, ...}]}` rows; `notes` as in `common.read_indexed`. Raises
    DataError."""
    return {index: row.scores for index, (_, row) in common.read_indexed(source, Scored, bench, notes).items()}


def notes_on(bench: dict[int, Item], judgments: dict[int, list[Quality]]) -> list[str]:
    """What was done where something is open: prompts without a judgment."""
    missing = len(bench) - len(judgments)
    return [f"{missing:,} of {len(bench):,} prompts have no judgment: they are left out of S_q and S"] if missing else []


def count_published_words(text: str) -> int:
    """Number of words by LongWriter's own count: Han characters of the basic block, and runs of ASCII letters that touch no
    digit, `_` or other letter.

    >>> count_published_words("GPT4 and 3D models, COVID19"), count_published_words("用GPT写作")
    (2, 3)
    """
    return len(_HAN.findall(text)) + len(_LATIN_WORD.findall(text))


def length_score(required_words: int, written_words: int) -> float:
    """S_l, 0-100 (LongWriter, section 2.2): 0 for four times the words asked for, a third of them, and beyond.

    >>> length_score(1000, 1000), length_score(1000, 2500), length_score(1000, 500), length_score(1000, 0)
    (100.0, 50.0, 50.0, 0.0)
    """
    if required_words <= 0 or written_words < 0:
        raise ValueError(f"required_words = {required_words} must be above 0, written_words = {written_words} at least 0")
    if written_words == 0:
        return 0.0
    if written_words > required_words:
        return 100 * max(0.0, 1 - (written_words / required_words - 1) / 3)
    return 100 * max(0.0, 1 - (required_words / written_words - 1) / 2)


def quality_score(judgment: Quality) -> float:
    """S_q of one judgment, 0-100: (mean of the six - 1) x 25."""
    return 25 * (sum(getattr(judgment, name) for name in DIMENSIONS) / len(DIMENSIONS) - 1)


async def judge_responses(settings: llm.Settings, bench: dict[int, Item], responses: dict[int, str], out: Path,
                          samples: int = 1, prompts: dict[str, str] = JUDGE) -> tuple[dict[int, list[Quality]], list[dict]]:
    """({index: `samples` judgments of the response}, rows of those without a valid answer); see `common.ask_judge`. The score
    file `out` is in the order of the benchmark. Resumes; raises DataError, llm.LLMError and RunError."""
    filled = {(index,): common.filled(prompts[item.language], query=item.prompt, response=common.judged_text(responses[index]))
              for index, item in bench.items() if index in responses}
    judgments, missing = await common.ask_judge(settings, JUDGE_SAMPLING, filled, Quality, samples, out)
    write_rows(out, (Scored(index=index, scores=grades).model_dump() for (index,), grades in judgments.items()))
    return {index: grades for (index,), grades in judgments.items()}, missing


def lengths(bench: dict[int, Item], responses: dict[int, str]) -> pd.DataFrame:
    """Table of lengths, a row per prompt that has a response: index, type, language, required_words, written_words, S_l."""
    rows = []
    for index, item in bench.items():
        if index in responses:
            words = count_published_words(common.judged_text(responses[index]))
            rows.append((index, item.type, item.language, item.required_words, words, length_score(item.required_words, words)))
    return pd.DataFrame(rows, columns=["index", "type", "language", "required_words", "written_words", "S_l"])


def score_table(bench: dict[int, Item], responses: dict[int, str], judgments: dict[int, list[Quality]] | None = None,
                resamples: int = 5000) -> pd.DataFrame:
    """A row for each measure in each part of the benchmark: scope (overall, language, type, length), name, measure (S_l, S_q,
    S, and each dimension, all 0-100), of (prompts of the benchmark), prompts (that have it), score, low and high (95%
    bootstrap interval over prompts). NaN where no prompt has the measure.

    A prompt with several judgments has their mean. S is taken over the prompts that have both S_l and S_q.
    """
    length_scores = lengths(bench, responses).set_index("index").S_l
    measures = {index: _measures(length_scores.get(index), (judgments or {}).get(index, [])) for index in bench}
    rows = []
    for (scope, name), indices in _parts(bench).items():
        for measure in ("S_l", "S_q", "S", *DIMENSIONS):
            values = [measures[index][measure] for index in indices if measure in measures[index]]
            score, low, high = intervals.bootstrap_mean(values, resamples)
            rows.append({"scope": scope, "name": name, "measure": measure, "of": len(indices), "prompts": len(values),
                         "score": score, "low": low, "high": high})
    return pd.DataFrame(rows)


def _measures(length_score: float | None, judgments: list[Quality]) -> dict[str, float]:
    """Measures that one prompt has, 0-100."""
    measures = {} if length_score is None else {"S_l": length_score}
    if judgments:
        measures["S_q"] = float(np.mean([quality_score(judgment) for judgment in judgments]))
        for name in DIMENSIONS:
            measures[name] = 25 * (float(np.mean([getattr(judgment, name) for judgment in judgments])) - 1)
    if "S_l" in measures and "S_q" in measures:
        measures["S"] = (measures["S_l"] + measures["S_q"]) / 2
    return measures


def _parts(bench: dict[int, Item]) -> dict[tuple[str, str], list[int]]:
    """{(scope, name): indices}"""
    parts = {("overall", "all"): list(bench)}
    for index, item in bench.items():
        size = next(name for name, end in CLASSES.items() if item.required_words < end)
        for part in (("language", item.language), ("type", item.type), ("length", size)):
            parts.setdefault(part, []).append(index)
    return parts
