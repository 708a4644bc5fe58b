"""Quantities of the rewards: what each pays for, who judges the writing, and how much each counts."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lwzlib.base.quantities import Count, Positive, Section


class LengthQuantities(Section):
    """Quantities of the length reward."""

    max_words: Positive  # `max` in the formula of the reward
    max_ratio: Annotated[float, Field(ge=0)]  # `max` as a multiple of the upper bound of each request; 0 = max_words for all

    @model_validator(mode="after")
    def _above_the_range(self):
        if 0 < self.max_ratio <= 1:
            raise ValueError(f"reward.length.max_ratio = {self.max_ratio} must be above 1, or 0 for max_words: a text at the "
                             "upper bound has the right length")
        return self


class WritingQuantities(Section):
    """Quantities of the writing reward: who judges, and where. A reward model gives a score, a language model behind an
    address judges by a rubric, or compares pairs of answers."""

    judge: Literal["reward-model", "rubric", "pairwise"]
    model: str  # Reward model: `stage` for the one that this recipe trains, a folder, or a name on the hub; else that at `url`
    url: str  # Address: of `lwz serve-rm` (empty = the trainer's process), or OpenAI-compatible, such as http://host:8000/v1
    patience_s: Positive  # Waiting time for a silent server
    prompts: str  # Wording of what a language model is asked: `kit:rubric`, `kit:critic`, `kit:pairwise`, or a YAML file
    criteria: str  # Rubric: `kit:criteria` for every query, or a .jsonl file with the criteria of each
    references: str  # Pairwise: a .jsonl file with a reference answer per query; empty = against the others of the group
    opponents: Positive  # Pairwise: number of others of its group with which each completion is compared
    sampling: dict[str, Any]  # Fields of each request to a language model, such as {temperature: 0, max_tokens: 512}
    requests: dict[str, Any]  # How it is asked: {concurrency: 32, budget_requests: 10000, json_schema: true, ...}

    @model_validator(mode="after")
    def _address(self):
        if self.judge != "reward-model" and not self.url:
            raise ValueError(f"judge: {self.judge} is a language model behind an address; give its url, such as "
                             "http://127.0.0.1:8000/v1")
        if self.judge != "reward-model" and self.model == "stage":
            raise ValueError(f"judge: {self.judge} needs the model's name at {self.url}, not 'stage'")
        return self


class FormatQuantities(Section):
    """Quantities of the format reward; the paper publishes neither the metric of repetition nor a threshold."""

    min_plan_words: Count  # Smallest length of a plan; with a shorter think segment the form is not exact
    encoder: str  # Sentence encoder of the semantic signal; empty = lexical signal alone
    encoder_languages: list[Literal["en", "zh"]]
    same_meaning: Annotated[float, Field(gt=0, le=1)]  # Cosine from which two runs of sentences say the same
    partial_credit: Annotated[float, Field(ge=0, lt=0.25)]  # Reward per tag, up to the first out of place; 0 = exact form only
    near_duplicate: Annotated[float, Field(gt=0, le=1)]  # Jaccard similarity from which two passages are duplicates
    tolerated_repetition: Annotated[float, Field(ge=0, lt=1)]  # Share of words that may repeat without penalty


class OverlongQuantities(Section):
    """Quantities of DAPO's soft overlong punishment, which is not in the paper."""

    cache_tokens: Positive  # Number of tokens, before the limit of a completion, over which the punishment grows from 0 to -1


class Weights(Section):
    """Weights of the rewards in the advantage; a reward of weight 0 is not computed."""

    length: Annotated[float, Field(ge=0)]
    writing: Annotated[float, Field(ge=0)]
    format: Annotated[float, Field(ge=0)]
    overlong: Annotated[float, Field(ge=0)]


class Reward(Section):
    """Rewards that `grpo` maximises; `distil` chooses by them, and they score the samples of an arm."""

    length: LengthQuantities
    writing: WritingQuantities
    format: FormatQuantities
    overlong: OverlongQuantities
    weights: Weights

    @property
    def by_language_model(self) -> bool:
        """Whether a language model behind an address is the writing reward."""
        return self.weights.writing > 0 and self.writing.judge != "reward-model"
