"""The paper's rewards as picklable callables with TRL's signature.

Length (published): 1 inside [lower, upper]; words / lower below; (max - words) / (max - upper) above. The value of
`max` and a floor are not published: `reward.length.max_words` names the first, and the reward is floored at 0.

Format (structure published, the rest not): exactly one `<think>` then exactly one `<answer>`, times a repetition factor
for passages of the answer that nearly repeat each other or the plan. `partial_credit` (off in `paper`) pays per tag that
stands exactly once, so that a model that starts without the form can find it.

Every reward is in [0, 1] and finite for every text.
"""

from dataclasses import dataclass

from lwzlib.overlap import find_overlap
from lwzlib.recipe import Recipe
from lwzlib.text import TAGS, Style, count_words, parse


def completion_text(completion) -> str:
    """TRL hands over a string, or a list of messages when prompts are conversations."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@dataclass(frozen=True)
class LengthReward:
    """How well the answer's words fit the range that the query asks for.

    >>> LengthReward(max_words=200).score(80, (50, 100)), LengthReward(max_words=200).score(150, (50, 100))
    (1.0, 0.5)
    """

    max_words: int
    __name__ = "length"

    def score(self, words: int, word_range: tuple[int, int]) -> float:
        lower, upper = word_range
        if not 0 <= lower <= upper < self.max_words:
            raise ValueError(f"word range [{lower}, {upper}] must satisfy 0 <= lower <= upper < "
                             f"reward.length.max_words = {self.max_words}")
        if words < lower:
            return words / lower
        return 1.0 if words <= upper else max(0.0, (self.max_words - words) / (self.max_words - upper))

    def __call__(self, completions, word_range, style, **_) -> list[float]:
        answers = [parse(completion_text(c), s).answer for c, s in zip(completions, style, strict=True)]
        return [self.score(count_words(a), r) for a, r in zip(answers, word_range, strict=True)]


@dataclass(frozen=True)
class FormatReward:
    """Structure times (1 - repetition), where repetition is the share of repeated words beyond what is tolerated.

    >>> FormatReward(0.6, 0.05)(["<answer>One day it rained.</answer>"], style=["direct"])
    [1.0]
    """

    near_duplicate: float
    tolerated_repetition: float
    partial_credit: float = 0.0
    __name__ = "format"

    def score(self, completion: str, style: Style) -> float:
        parsed = parse(completion, style)
        exact = parsed.exact and parsed.answer != ""
        structure = 1.0 if exact else self.partial_credit * sum(completion.count(tag) == 1 for tag in TAGS[style])
        # Partial credit pays for repetition too: else a loop would earn more by breaking the form.
        return structure and structure * self.repetition_factor(parsed.answer, parsed.plan)

    def repetition_factor(self, answer: str, plan: str = "") -> float:
        share = find_overlap(answer, self.near_duplicate, against=plan).share
        return 1 - max(0.0, share - self.tolerated_repetition) / (1 - self.tolerated_repetition)

    def __call__(self, completions, style, **_) -> list[float]:
        return [self.score(completion_text(c), s) for c, s in zip(completions, style, strict=True)]


def build(recipe: Recipe) -> dict:
    """{name: reward} for the components whose weight is above 0. Raises ValueError where one cannot be built."""
    weights = recipe.reward.weights
    if weights.writing > 0:
        raise ValueError("reward.weights.writing is above 0, and this version of the kit has no Writing RM yet: "
                         "set reward.weights.writing=0.0 (a departure from the paper, which the report will name)")
    rewards = {"length": LengthReward(recipe.reward.length.max_words), "format": FormatReward(
        recipe.reward.format.near_duplicate, recipe.reward.format.tolerated_repetition,
        recipe.reward.format.partial_credit)}
    if not any(getattr(weights, name) for name in rewards):
        raise ValueError("reward.weights are all 0; give length or format a weight above 0")
    return {name: reward for name, reward in rewards.items() if getattr(weights, name) > 0}
