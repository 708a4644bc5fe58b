"""The paper's three rewards and an option, as picklable callables with TRL's signature; each is finite for every text.

Length, in [0, 1] (published): 1 inside [lower, upper]; words / lower below; (max - words) / (max - upper) above. Not published:
`max` (here `reward.length.max_words`, or `max_ratio` times the upper bound of each request) and a floor (here 0).

Writing, any real number (published): a Bradley-Terry model's score of query and answer (`writing_rm`, `train_writing_rm`).

Format, in [0, 1] (structure published, the rest not): exactly one `<think>` then exactly one `<answer>`, times a factor below 1
if passages of the answer repeat each other (by letters or by meaning) or copy the plan (by letters). `partial_credit` (0 in
`paper`) pays for each tag in its place, up to the first wrong one, so that a model that starts without the form can find it;
when any place was paid for, policies put the answer inside the plan. A plan below `min_plan_words` does not count as one.

Overlong, in [-1, 0], is not in the paper and off: DAPO's soft punishment (arXiv 2503.14476, equation 13), as TRL ships it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from lwzlib.base.models import embed
from lwzlib.base.recipe import Recipe
from lwzlib.method.overlap import Meaning, Overlap, find_overlaps
from lwzlib.method.prompts import opening_of
from lwzlib.method.text import Parsed, Style, count_words, has_form, parse
from lwzlib.method.writing_rm import Scorer, cut_to_fit, is_public, is_writing_rm, read_info, remote_scores


class RewardError(ValueError):
    """A reward that cannot be built; the message says what is missing."""


def whole_completion(completion, prompt="") -> str:
    """Text of a completion of TRL, from the tag on that its prompt opens. Either is a string, or a list of messages."""
    prompt, completion = (part if isinstance(part, str) else part[-1]["content"] for part in (prompt, completion))
    return opening_of(prompt) + completion


def parse_all(completions, styles, prompts=None) -> list[Parsed]:
    """Parts of each completion of TRL, in the style of its prompt; without `prompts` the completions are whole already."""
    wholes = map(whole_completion, completions, prompts or [""] * len(completions))
    return [parse(whole, style) for whole, style in zip(wholes, styles, strict=True)]


@dataclass(frozen=True)
class LengthReward:
    """Fit of the answer's number of words to the range that the query asks for.

    >>> LengthReward(max_words=200).score(80, (50, 100)), LengthReward(max_words=200).score(150, (50, 100))
    (1.0, 0.5)
    """

    max_words: int
    max_ratio: float = 0.0
    __name__ = "length"

    def score(self, words: int, word_range: tuple[int, int]) -> float:
        """Reward in [0, 1] by the module's formula. Raises RewardError unless 0 <= lower <= upper < `max`."""
        lower, upper = word_range
        most = self.max_ratio * upper if self.max_ratio else self.max_words
        if not 0 <= lower <= upper < most:
            raise RewardError(f"word range [{lower}, {upper}] must satisfy 0 <= lower <= upper < " + (
                f"reward.length.max_ratio * upper = {most:g}" if self.max_ratio else f"reward.length.max_words = {most}"))
        if words < lower:
            return words / lower
        return 1.0 if words <= upper else max(0.0, (most - words) / (most - upper))

    def __call__(self, completions, word_range, style, prompts=None, **_) -> list[float]:
        """TRL's call: one reward per completion, for the words of its answer. Raises RewardError as `score` does."""
        answers = [parsed.answer for parsed in parse_all(completions, style, prompts)]
        return [self.score(count_words(answer), bounds) for answer, bounds in zip(answers, word_range, strict=True)]


@dataclass(frozen=True)
class FormatReward:
    """Structure times (1 - excess): `excess` rises from 0 to 1 with the share of repeated words, from the tolerated share on.

    `encoder` names the sentence encoder of the semantic signal, for texts in `encoder_languages`; "" leaves it off.

    >>> FormatReward(0.6, 0.05)(["<answer>One day it rained.</answer>"], style=["direct"])
    [1.0]
    """

    near_duplicate: float
    tolerated_repetition: float
    partial_credit: float = 0.0
    min_plan_words: int = 0
    encoder: str = ""
    encoder_languages: tuple[str, ...] = ("en",)
    same_meaning: float = 1.0
    __name__ = "format"

    def score(self, completion: str, style: Style) -> float:
        """Reward of one completion, in [0, 1]."""
        return self([completion], style=[style])[0]

    def overlaps(self, answers: list[str], plans: list[str]) -> list[Overlap]:
        """Passages of each answer that repeat itself or its plan; by meaning too where there is an `encoder`."""
        meaning = None
        if self.encoder:
            meaning = Meaning(functools.partial(embed, name=self.encoder), self.same_meaning, self.encoder_languages)
        return find_overlaps(answers, self.near_duplicate, plans, meaning)

    def structure(self, parsed: Parsed, style: Style) -> float:
        """1 for the exact form with an answer, and a plan if one is asked for; else `partial_credit` per tag in its place."""
        return 1.0 if has_form(parsed, style, self.min_plan_words) else self.partial_credit * parsed.tags_in_place

    def __call__(self, completions, style, prompts=None, **_) -> list[float]:
        """TRL's call: one reward per completion, in [0, 1]."""
        parsed = parse_all(completions, style, prompts)
        scores = [self.structure(*parts) for parts in zip(parsed, style, strict=True)]
        # Repetition lowers partial credit too: else a loop would earn more by breaking the form.
        judged = [i for i, structure in enumerate(scores) if structure]
        overlaps = self.overlaps([parsed[i].answer for i in judged], [parsed[i].plan for i in judged])
        for i, overlap in zip(judged, overlaps, strict=True):
            scores[i] *= 1 - max(0.0, overlap.share - self.tolerated_repetition) / (1 - self.tolerated_repetition)
        return scores


@dataclass(frozen=True)
class WritingReward:
    """The score that a trained Writing RM in `folder` gives the answer to the query, any real number.

    Scored in this process, or by vLLM at `url` (`lwz serve-rm`), which must serve the same model and is waited for
    `patience_s` seconds. An answer that is empty gets the model's floor: the lowest score it gave on held-out pairs.
    """

    folder: str
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    url: str = ""
    patience_s: float = 600
    __name__ = "writing"

    @property
    def identity(self) -> str:
        """The fingerprint of the model's training, by which a server must serve it."""
        return read_info(self.folder)["identity"]

    def score(self, texts: list[tuple[str, str]]) -> list[float]:
        """A score for each (query, answer), none of the answers empty."""
        if self.url:
            return remote_scores(self.folder, self.url, texts, self.patience_s)
        return _scorer(self.folder, self.dtype, self.attention)(texts)

    def of_answers(self, texts: list[tuple[str, str]]) -> list[float]:
        """Scores of (query, answer) pairs, where an answer may be empty."""
        written = [text for text in texts if text[1]]
        values = iter(self.score(written))  # without any text too: where the model is sharded, the others wait for this process
        return [next(values) if answer else read_info(self.folder)["floor"] for _, answer in texts]

    def __call__(self, completions, style, query, prompts=None, log_metric=None, **_) -> list[float]:
        """TRL's call: one score per answer. With TRL's `log_metric` a text that is too long for the model is cut, and the share
        of such texts logged; else it raises RunError. With a `url` it raises ScoringError."""
        texts = [(asked, parsed.answer) for asked, parsed in zip(query, parse_all(completions, style, prompts), strict=True)]
        if log_metric:
            whole, texts = texts, cut_to_fit(self.folder, texts)
            log_metric("cut_for_writing", sum(a != b for a, b in zip(whole, texts, strict=True)) / max(1, len(texts)))
        return self.of_answers(texts)

    def check(self, queries: list[str]) -> None:
        """Raise RewardError for a query that leaves the model no room for an answer."""
        for query, answer in cut_to_fit(self.folder, [(query, "Answer.") for query in queries]):
            if not answer:
                raise RewardError(f"the query {query[:60]!r} is longer than the Writing RM reads: writing_rm.max_tokens = "
                                  f"{read_info(self.folder)['max_tokens']}")


_scorer = functools.cache(Scorer)


@dataclass(frozen=True)
class OverlongReward:
    """Punishment of a completion that takes some of the last `cache_tokens` of its `max_tokens`: 0 to -1, evenly.

    Tokens are those of the policy, plan and tags included; where a caller has only texts, the reward is unknown (None).

    >>> OverlongReward(100, 20)([""] * 3, completion_ids=[range(80), range(90), range(100)])
    [0.0, -0.5, -1.0]
    """

    max_tokens: int
    cache_tokens: int
    __name__ = "overlong"

    def __call__(self, completions, completion_ids=None, **_) -> list[float | None]:
        """TRL's call: one reward per completion, None for each without `completion_ids`."""
        from trl.rewards import get_soft_overlong_punishment

        if completion_ids is None:
            return [None] * len(completions)
        return get_soft_overlong_punishment(self.max_tokens, self.cache_tokens)(completion_ids)


def build_rewards(recipe: Recipe, writing_rm: str | Callable = "") -> dict:
    """{name: reward} for the components whose weight is above 0. `writing_rm`: the folder of the Writing RM, unless the recipe
    names one that the kit trained, or a reward that stands in its place. Raises RewardError where one cannot be built."""
    reward = recipe.reward
    folder = "" if callable(writing_rm) else reward.writing.model if is_writing_rm(reward.writing.model) else writing_rm
    unusable = reward.weights.writing > 0 and not (callable(writing_rm) or is_writing_rm(folder))
    if unusable and is_public(recipe):
        raise RewardError(f"{reward.writing.model} was not measured yet, and an empty answer gets its lowest score: run "
                          "`lwz stage judge` first, and name its folder where a Writing RM is wanted")
    if unusable:
        raise RewardError(f"reward.weights.writing is above 0, and there is no Writing RM in {folder or 'this run'}: run "
                          "`lwz stage writing-rm` first, name one in reward.writing.model, or set reward.weights.writing=0")
    longest, cache = recipe.grpo.sampling.max_new_tokens, reward.overlong.cache_tokens
    if reward.weights.overlong > 0 and cache > longest:
        raise RewardError(f"reward.overlong.cache_tokens = {cache} must be at most grpo.sampling.max_new_tokens = {longest}: "
                          "with more, every completion is punished")
    rewards = {
        "length": LengthReward(reward.length.max_words, reward.length.max_ratio),
        "writing": writing_rm if callable(writing_rm) else WritingReward(
            folder, recipe.model.dtype, recipe.model.attention, reward.writing.url, reward.writing.patience_s),
        "format": FormatReward(**reward.format.model_dump() | {"encoder_languages": tuple(reward.format.encoder_languages)}),
        "overlong": OverlongReward(longest, cache),
    }
    return {name: rewards[name] for name in reward_names(recipe)}


def reward_names(recipe: Recipe) -> list[str]:
    """Names of the rewards whose weight is above 0, in `build_rewards`' order too. Raises RewardError if there is none."""
    names = [name for name in ("length", "writing", "format", "overlong") if getattr(recipe.reward.weights, name) > 0]
    if not names:
        raise RewardError("reward.weights are all 0; give at least one a weight above 0")
    return names
