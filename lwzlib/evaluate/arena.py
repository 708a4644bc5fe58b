"""Arena-Write: texts of two models for the same request side by side, each pair judged in both orders.

The paper compares with six baselines on 100 prompts; its judges are Qwen2.5-72B and GPT-4.1, a tie counts 0.5. Its prompt
for the judges is not published: the kit's is worded anew. The embedded arena is the kit's own held-out queries, and its
judge is the Writing RM, which compares two scores: say so wherever it is shown.

A judgment is one row: query_id, first, second (the models, in the order shown), winner (first, second, tie, or missing
where the judge gave no valid answer), judge, reason. What they add up to is in `elo`, how far to trust them in `trust`.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from lwzlib.base.rows import DataError, read_rows, rows_of, validated, write_rows
from lwzlib.endpoints import llm
from lwzlib.evaluate.common import filled, judge_prompts, with_openings
from lwzlib.evaluate.elo import ArenaError
from lwzlib.method.text import language_of, shown
from lwzlib.method.writing_rm import is_writing_rm

JUDGE = judge_prompts("arena")
COLUMNS = ["query_id", "first", "second", "winner", "judge", "reason"]
SCHEMA = "a judgment is {query_id, first, second, winner: first, second, tie or null, judge, reason}"
_PROMPTS_IN_MEMORY = 1000  # each holds two whole texts
_WINNERS = {"A": "first", "B": "second", "tie": "tie"}


class Task(NamedTuple):
    """A request to write. `type` is its genre, in the words of whoever made the request."""

    id: str
    question: str
    type: str = "unknown"


@dataclass(frozen=True)
class Arena:
    """`tasks` by id, and `texts`: {model: {task id: text}}; a model need not have answered every task."""

    tasks: dict[str, Task]
    texts: dict[str, dict[str, str]]

    def joined_by(self, model: str, texts: Mapping[str, str]) -> "Arena":
        """Arena with one more model. Raises ArenaError if its name is taken or a text has no task."""
        if model in self.texts:
            raise ArenaError(f"there is already a model {model!r}")
        if unknown := texts.keys() - self.tasks.keys():
            raise ArenaError(f"{model}: texts for unknown queries: {', '.join(sorted(unknown)[:5])}")
        return replace(self, texts=self.texts | {model: dict(texts)})


class Match(NamedTuple):
    """Two models on one query, in the order in which a judge is shown them."""

    query_id: str
    first: str
    second: str


class _Public(BaseModel):
    idx: int | str
    question: str = Field(min_length=1)
    type: str = "unknown"
    baseline_response: str | dict | list = ""


class _Judgment(BaseModel):
    model_config = ConfigDict(extra="forbid")

    query_id: str = Field(min_length=1)
    first: str = Field(min_length=1)
    second: str = Field(min_length=1)
    winner: Literal["first", "second", "tie"] | None
    judge: str = Field(min_length=1)
    reason: str = ""


class Verdict(BaseModel):  # noqa: D101  # a docstring would stand in the JSON schema that an endpoint gets
    winner: Literal["A", "B", "tie"]
    reason: str = ""


class _Completion(BaseModel):
    id: str
    completion: str


def read_arena(source: str) -> Arena:
    """The public form: a JSONL file or `hub:<dataset>`, rows idx, question, type, baseline_response.

    The dataset's card does not show how `baseline_response` holds its six models. Taken are {model: text}, a list of
    {model, response}, either of them as a JSON string, or nothing. Plans are taken off, as from the player's texts. Raises
    DataError, naming the place.
    """
    tasks, texts = {}, {}
    for place, content in rows_of(source):
        row = validated(place, content, _Public)
        task = Task(str(row.idx), row.question, row.type)
        if task.id in tasks:
            raise DataError(f"{place}: idx {task.id} is there twice")
        tasks[task.id] = task
        for model, text in _baselines(place, row.baseline_response).items():
            texts.setdefault(model, {})[task.id] = text
    if not tasks:
        raise DataError(f"{source} has no row")
    return Arena(tasks, {model: _shown(own) for model, own in texts.items()})


def _shown(texts: dict[str, str]) -> dict[str, str]:
    """Texts of one model as a judge reads them."""
    return {task: shown(text) for task, text in with_openings(texts).items()}


def _baselines(place: str, responses) -> dict[str, str]:
    if isinstance(responses, str) and responses.strip():
        with contextlib.suppress(ValueError):  # a text that is no JSON is refused below
            responses = json.loads(responses)
    if isinstance(responses, list) and all(isinstance(response, dict) for response in responses):
        by_model = {response.get("model"): response.get("response") for response in responses}
        responses = by_model if len(by_model) == len(responses) else None
    responses = {} if responses == "" else responses
    if not isinstance(responses, dict) or not all(isinstance(part, str) for pair in responses.items() for part in pair):
        raise DataError(f"{place}: baseline_response must be {{model: text}} or a list of {{model, response}}, each model once")
    return responses


def of_samples(samples: Mapping[str, Iterable[dict]]) -> Arena:
    """The embedded arena: {model: rows of its `samples.jsonl`}, each with id, query, type and completion.
    Raises ArenaError if a model answers a query twice, or an id has another query elsewhere."""
    tasks, texts = {}, {}
    for model, rows in samples.items():
        own = texts.setdefault(model, {})
        for row in rows:
            task = Task(row["id"], row["query"], row.get("type", "unknown"))
            if tasks.setdefault(task.id, task).question != task.question:
                raise ArenaError(f"{model}: query {task.id} has another text than with the models before")
            if task.id in own:
                raise ArenaError(f"{model}: query {task.id} is answered twice; an arena takes one text of each model")
            own[task.id] = shown(row["completion"])
    return Arena(tasks, texts)


def read_player(source: str | Path, arena: Arena) -> dict[str, str]:
    """{task id: text} of one more model: rows of id and completion, as `lwz generate` writes them. Raises DataError."""
    texts = {}
    for place, content in rows_of(str(source)):
        row = validated(place, content, _Completion)
        if row.id not in arena.tasks or row.id in texts:
            raise DataError(f"{place}: id {row.id!r} " + ("is answered twice" if row.id in texts else "is not in the arena"))
        texts[row.id] = row.completion
    return _shown(texts)


def player_name(arm: str, step: float) -> str:
    """A checkpoint's name, from which `elo.over_steps` reads the RL step; without one (SFT) it is what stood at the end."""
    return f"{arm} after" if pd.isna(step) else f"{arm}@{step:.0f}"


def by_step(held_out: pd.DataFrame) -> tuple[Arena, dict[tuple[str, str], float]]:
    """(arena, {(model, query id): Writing RM score}) of a held-out table with the samples of RL
    (`run_tables.held_out_table`): each checkpoint is a model, `arm@step`."""
    rows = held_out.dropna(subset="step")
    rows = rows.assign(model=list(map(player_name, rows.arm, rows.step)))
    scores = {(model, row_id): score for model, row_id, score in rows.reindex(columns=["model", "id", "writing"]).values}
    return of_samples({model: own.to_dict("records") for model, own in rows.groupby("model", sort=False)}), scores


def samples_of_run(folder: Path) -> dict[str, list[dict]]:
    """{arm, or `arm before`: its held-out samples} of a run folder. Raises ArenaError if there are none."""
    samples = {f"{path.parent.parent.name}{' before' * path.parent.name.endswith('before')}": read_rows(path)
               for path in sorted(Path(folder).glob("*/samples-*/samples.jsonl"))}
    if not samples:
        raise ArenaError(f"no samples in {folder}; `lwz run nano` writes them into runs/nano")
    return samples


def matches(arena: Arena) -> list[Match]:
    """Both orders of every pair of models, on every query that both answered. Raises ArenaError if there is none."""
    both_orders = []
    for one, other in combinations(sorted(arena.texts), 2):
        for task in arena.tasks:
            if task in arena.texts[one] and task in arena.texts[other]:
                both_orders += [Match(task, one, other), Match(task, other, one)]
    if not both_orders:
        raise ArenaError(f"no two models answered the same query; the arena has {', '.join(arena.texts) or 'no model'}: give "
                         "`--player name=FILE` for one more")
    return both_orders


async def judged_by_llm(arena: Arena, pairs: list[Match], settings: llm.Settings, replies: Path) -> pd.DataFrame:
    """Judgments of a language model; its `replies` on disk make it resumable, and nothing is paid for twice.
    Raises llm.LLMError (the budget too) and RunError: the same call goes on from there."""
    rows, spent = [], llm.Spent()
    for start in range(0, len(pairs), _PROMPTS_IN_MEMORY):
        part = pairs[start : start + _PROMPTS_IN_MEMORY]
        requests = [llm.Request(judge_prompt(arena, match), Verdict) for match in part]
        title = f"judge, from {start:,} of {len(pairs):,}:"
        for match, verdict in zip(part, await llm.ask(requests, settings, replies, spent, title), strict=True):
            winner, reason = ((None, str(verdict)) if isinstance(verdict, llm.NoAnswer) else
                              (_WINNERS[verdict.winner], verdict.reason))
            rows.append((*match, winner, settings.model, reason))
    return judgment_table(rows)


def judge_prompt(arena: Arena, match: Match) -> str:
    """Prompt for the judge, in the language of the request."""
    request = arena.tasks[match.query_id].question
    first, second = (arena.texts[model][match.query_id] for model in (match.first, match.second))
    return filled(JUDGE[language_of(request)], request=request, first=first, second=second)


def score_texts(arena: Arena, scorer: Callable[[list[tuple[str, str]]], list[float]]) -> dict[tuple[str, str], float]:
    """{(model, query id): score} of every text. `scorer` maps (request, text) pairs to scores, as a Writing RM does."""
    places = [(model, task) for model, texts in arena.texts.items() for task in texts]
    scores = scorer([(arena.tasks[task].question, arena.texts[model][task]) for model, task in places])
    return dict(zip(places, map(float, scores), strict=True))


def judged_by_scores(pairs: list[Match], scores: Mapping[tuple[str, str], float], judge: str, margin: float) -> pd.DataFrame:
    """The higher score wins; a difference of at most `margin` is a tie, a score that is not finite a missing judgment.
    Both orders say the same by construction, so such a judge has no position bias to measure."""
    rows = []
    for match in pairs:
        difference = scores[match.first, match.query_id] - scores[match.second, match.query_id]
        winner = (None if not np.isfinite(difference) else
                  "tie" if abs(difference) <= margin else "first" if difference > 0 else "second")
        rows.append((*match, winner, judge, f"scores differ by {difference:+.4g}"))
    return judgment_table(rows)


def writing_rm_of(run: Path, named: str = "stage") -> Path:
    """Folder of the Writing RM that is `named`, else of the one that a run trained, or of the public one that it measured."""
    if is_writing_rm(named):
        return Path(named)
    return run / "judge" if (run / "judge" / "writing_rm.json").is_file() else run / "writing-rm" / "model"


def judged_by_writing_rm(arena: Arena, folder: str | Path, margin: float) -> pd.DataFrame:
    """Every pair in both orders by the scores of the Writing RM in `folder`. Raises RewardError if there is none."""
    from lwzlib.method.rewards import RewardError, WritingReward

    if not (Path(folder) / "writing_rm.json").is_file():
        raise RewardError(f"no Writing RM in {folder}: `lwz stage writing-rm` trains one; or name another judge")
    rm = WritingReward(str(folder))
    scores = score_texts(arena, rm.of_answers)
    return judged_by_scores(matches(arena), scores, f"Writing RM {rm.identity[:12]}", margin)


def read_judgments(path: str | Path) -> pd.DataFrame:
    """Judgments from a JSONL file, of people or of models. Raises DataError at the first row that breaks the schema or
    judges again what the same judge was already shown in that order, and if there is none."""
    rows = {}
    for place, content in rows_of(str(path)):
        try:
            judgment = validated(place, content, _Judgment)
        except DataError as error:
            raise DataError(f"{error}; {SCHEMA}") from None
        key = judgment.query_id, judgment.first, judgment.second, judgment.judge
        if judgment.first == judgment.second or key in rows:
            raise DataError(f"{place}: {' / '.join(key)} " + ("was judged before" if key in rows else "plays itself"))
        rows[key] = judgment.model_dump()
    if not rows:
        raise DataError(f"{path} has no judgment; {SCHEMA}")
    return judgment_table(rows.values())


def save_judgments(path: Path, judgments: pd.DataFrame) -> None:
    """Write judgments for `read_judgments`; the old file or the new one, never a part."""
    write_rows(path, judgments.astype(object).where(judgments.notna(), None).to_dict("records"))


def judgment_table(rows: Iterable[dict | tuple]) -> pd.DataFrame:
    """Table of judgments with the columns `COLUMNS`; what is missing is None, never NaN."""
    return pd.DataFrame(rows, columns=COLUMNS).astype(object).replace({np.nan: None})
