"""Language models as the writing reward, behind an OpenAI-compatible address: by a rubric, or by comparing answers in pairs.

The paper's judge is a Bradley-Terry model (`lwzlib.method.writing_rm`). By a rubric a language model gives each criterion an
integer from 1 to 10, a request for each, as WritingBench (arXiv 2503.05244) does; the reward is their mean. In pairs it is
shown two answers to a query, in both orders, as in the arena, since judges favour a place; the reward is the share of wins, a
tie half. `docs/judges.md` says what each costs and where it errs.

Every reply is kept on disk under what was asked, so a run that was killed pays for nothing twice, and its rows are those of
one that was not. A judgment that cannot be had is None: TRL makes it NaN, and the advantage leaves it out.
"""

import abc
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from lwzlib.base.awaited import finished, from_main
from lwzlib.base.processes import main_process
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import DataError
from lwzlib.endpoints import llm
from lwzlib.evaluate.arena import Verdict
from lwzlib.evaluate.judge_files import Prompts, messages, read_criteria, read_prompts, read_references
from lwzlib.evaluate.writingbench import Judgment
from lwzlib.method.queries import load_queries
from lwzlib.method.rewards import RewardError, parse_all
from lwzlib.method.text import language_of

Text = tuple[str, str]  # query, answer
_RECIPES_OWN = ("base_url", "model", "sampling", "patience_s")
_WINS = {"A": 1.0, "tie": 0.5, "B": 0.0}  # of the text that stands first


@dataclass(frozen=True, eq=False)
class Judge(abc.ABC):
    """A reward with TRL's signature, which TRL awaits. `given`: criteria or reference answers, by query (the kit's criteria: by
    language), from `source`. What it `spent` counts against the budget."""

    settings: llm.Settings
    prompts: Prompts
    given: dict[str, Any]
    source: str
    cache: Path
    opponents: int = 0
    spent: llm.Spent = field(default_factory=llm.Spent)
    lowest: ClassVar[float] = 0.0  # what an empty answer gets, without being asked about
    __name__ = "writing"

    async def __call__(self, completions, style, query, prompts=None, log_metric=None, **_) -> list[float | None]:
        """TRL's call: one score per answer, None where it cannot be had; TRL logs the share of those. Every process
        must call it. Raises llm.LLMError, RunError and DataError."""
        texts = [(asked, parsed.answer) for asked, parsed in zip(query, parse_all(completions, style, prompts), strict=True)]
        scores = await from_main(self.of_answers, texts)
        if log_metric:
            log_metric("not_judged", scores.count(None) / max(1, len(scores)))
        return scores

    def check(self, queries: list[str]) -> None:
        """Raise DataError for a query that cannot be judged, and llm.LLMError unless the address answers and has the model."""
        self.check_queries(queries)
        self.check_address(self.settings.patience_s)

    def check_queries(self, queries: list[str]) -> None:
        """Raise DataError for a query without criteria or reference, or in a language for which there is no prompt."""
        for query in queries:
            self.for_query(query)
            messages(self.prompts, query)

    def check_address(self, patience_s: float) -> None:
        """Raise llm.LLMError unless the address answers within `patience_s` and has the model; the main process alone asks."""
        if main_process():
            try:
                finished(llm.check(self.settings.model_copy(update={"patience_s": patience_s})))
            except llm.LLMError as error:
                raise llm.LLMError(f"reward.writing.url: {error}") from None

    def for_query(self, query: str) -> Any:
        """Criteria or reference of a query. Raises DataError if there are none."""
        own = self.given.get(query, self.given.get(language_of(query)))
        if self.given and own is None:
            raise DataError(f"{self.source} has nothing for the query {query[:80]!r}: each query needs its row there")
        return own

    async def of_answers(self, texts: list[Text]) -> list[float | None]:
        """A score for each text, asked for in this process; says what is missing, and scores that are all the same."""
        questions = self.questions(texts)
        replies = await llm.ask(list(questions.values()), self.settings, self.cache, self.spent, "judged") if questions else []
        if missing := [reply for reply in replies if isinstance(reply, llm.NoAnswer)]:
            print(f"{len(missing)} of {len(replies)} judgments of {self.settings.model} are missing; the first: {missing[0]}",
                  flush=True)
        scores = self.scores(texts, {key: None if isinstance(reply, llm.NoAnswer) else reply
                                     for key, reply in zip(questions, replies, strict=True)})
        given = [score for score in scores if score is not None]
        if questions and len(given) > 1 and len(set(given)) == 1:
            print(f"ALL THE SAME: {self.settings.model} gave each of {len(given)} answers {given[0]:g}, so its reward teaches "
                  "nothing here. If this goes on, ask a better judge, or give other criteria", flush=True)
        return scores

    @abc.abstractmethod
    def questions(self, texts: list[Text]) -> dict[Any, llm.Request]:
        """What is asked about the texts, by a key of its own."""

    @abc.abstractmethod
    def scores(self, texts: list[Text], replies: dict) -> list[float | None]:
        """Scores of the texts by the replies to `questions`, None for one that is missing."""


class RubricJudge(Judge):
    """Mean of an integer from 1 to 10 for each criterion; None unless all were judged, for a mean over the others would follow
    which one is missing."""

    lowest = 1.0

    def questions(self, texts):
        """Requests by (text, criterion)."""
        return {(i, number): llm.Request(messages(self.prompts, query, query=query, response=answer, criterion=str(criterion)),
                                         Judgment)
                for i, (query, answer) in enumerate(texts) if answer for number, criterion in enumerate(self.for_query(query))}

    def scores(self, texts, replies):
        """Means, as the class says."""
        given = defaultdict(list)
        for (i, _), judgment in replies.items():
            given[i].append(judgment)
        return [None if None in given[i] else fmean(judgment.score for judgment in given[i]) if answer else self.lowest
                for i, (_, answer) in enumerate(texts)]


class PairwiseJudge(Judge):
    """Share of wins against the reference answer of the query or, without references, against others that answer it too. A pair
    counts if it was judged in both orders; equal texts tie, and an empty one loses, unasked."""

    def pairs(self, texts: list[Text]) -> list[tuple[int, int]]:
        """Places of two answers that are compared; the references follow the texts."""
        if self.given:
            return [(i, len(texts) + i) for i in range(len(texts))]
        groups: dict[str, list[int]] = defaultdict(list)
        for i, (query, _) in enumerate(texts):
            groups[query].append(i)
        return [(group[i], group[j]) for group in groups.values() for i, j in ring(len(group), self.opponents)]

    def questions(self, texts):
        """Requests by (first, second), the places of the two answers in the order shown."""
        answers, requests = self._answers(texts), {}
        for i, j in self.pairs(texts):
            if answers[i] and answers[j] and answers[i] != answers[j]:
                for first, second in ((i, j), (j, i)):
                    requests[first, second] = llm.Request(messages(
                        self.prompts, texts[i][0], request=texts[i][0], first=answers[first], second=answers[second]), Verdict)
        return requests

    def scores(self, texts, replies):
        """Shares, as the class says."""
        answers, pairs, wins = self._answers(texts), self.pairs(texts), defaultdict(list)
        for i, j in pairs:
            verdicts = replies.get((i, j)), replies.get((j, i))
            if (i, j) not in replies:
                win = 0.5 if answers[i] == answers[j] else float(bool(answers[i]))
            elif None in verdicts:
                continue
            else:
                win = (_WINS[verdicts[0].winner] + 1 - _WINS[verdicts[1].winner]) / 2
            wins[i].append(win)
            wins[j].append(1 - win)
        compared = {place for pair in pairs for place in pair}
        if alone := sum(bool(answer) and i not in compared for i, (_, answer) in enumerate(texts)):
            print(f"{alone} of {len(texts)} answers have no other answer to compare with, and reward.writing.references is "
                  "empty: they get no writing score", flush=True)
        return [self.lowest if not answer else fmean(wins[i]) if wins[i] else None for i, (_, answer) in enumerate(texts)]

    def _answers(self, texts: list[Text]) -> list[str]:
        references = [self.for_query(query) for query, _ in texts] if self.given else []
        return [answer for _, answer in texts] + references


def ring(size: int, opponents: int) -> list[tuple[int, int]]:
    """Pairs of `size` members of a circle, each pair once: each member meets its `opponents` nearest others, one more where
    both numbers are odd, and all of them where there are no more.

    >>> ring(4, 2), ring(4, 1)
    ([(0, 1), (1, 2), (2, 3), (3, 0)], [(0, 2), (1, 3)])
    """
    most = min(opponents, size - 1)
    most += most % 2 and size % 2  # an odd number of members cannot each meet an odd number of others
    around = [(i, (i + distance) % size) for distance in range(1, most // 2 + 1) for i in range(size)]
    return around + [(i, i + size // 2) for i in range(size // 2) if most % 2]


def judge_of(recipe: Recipe, folder: Path) -> Judge:
    """The judge that `reward.writing` names, whose replies are kept in `folder`. Raises RewardError for settings that cannot
    be, and DataError for a file that cannot be used."""
    writing = recipe.reward.writing
    if own := [name for name in _RECIPES_OWN if name in writing.requests]:
        raise RewardError(f"reward.writing.requests holds {', '.join(own)}: those are quantities of reward.writing itself, url "
                          "(base_url), model, sampling and patience_s")
    try:
        settings = llm.configure(**writing.requests, base_url=writing.url, model=writing.model, sampling=writing.sampling,
                                 patience_s=writing.patience_s)
    except llm.LLMError as error:
        raise RewardError(f"reward.writing (base_url is its url, the others may stand in requests): {error}") from None
    prompts, cache = read_prompts(writing.prompts, writing.judge), Path(folder) / "judge.replies.jsonl"
    sources = (recipe.data.train, recipe.data.heldout)
    queries = [query for source in sources for query in load_queries(source, recipe.data.languages)]
    if writing.judge == "rubric":
        return RubricJudge(settings, prompts, read_criteria(writing.criteria, queries), writing.criteria, cache)
    references = read_references(writing.references, queries) if writing.references else {}
    return PairwiseJudge(settings, prompts, references, writing.references, cache, writing.opponents)
