"""Quantities of a recipe, section by section: types, bounds, and the meaning where the name does not say it."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lwzlib.base import trl_knobs

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]  # of the softmax; 0 = greedy


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """End of an error that says what was probably meant; "" if no valid name is like it."""
    near = difflib.get_close_matches(name, map(str, valid), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


class Section(BaseModel):
    """Quantities that belong together; unknown names, other types, NaN and infinity are refused, and all is frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The base model of all stages; the Writing RM is trained in its dtype and frame."""

    name: str  # Path or name of a model: a folder, `kit:smollm2-135m-instruct`, `kit:tiny`, or a name on the hub
    dtype: Literal["bfloat16", "float32"]
    attention: Literal["eager", "sdpa", "flash_attention_2"]
    frame: Literal["plain", "chat"]  # Prompt frame: plain text for a base model, its chat template for an instruct model
    trust_remote_code: bool


class Data(Section):
    """Queries to train on, and held-out queries, which `corpus` keeps out of the documents; all stages read them."""

    train: str  # Source of queries: `kit:train`, `kit:train_short`, `kit:train_lengths`, a .jsonl file, or `hub:<dataset>`
    heldout: str  # Source of queries, as in `train`
    languages: list[Literal["en", "zh"]] = Field(min_length=1)


class Prompt(Section):
    """Instruction that asks for the form: in `cold-start`, `sft`, `grpo`, `distil` and the samples of an arm."""

    wording: Literal["full", "brief"]
    worked_examples: Annotated[int, Field(ge=0, le=2)]


class Lora(Section):
    """Adapter of `cold_start`, `writing_rm`, `grpo` or `sft`; it is merged into the model at the end."""

    rank: Count  # Rank of the adapter; 0 = all weights are trained
    alpha: Positive
    targets: list[str] | Literal["all-linear"]  # Names of the modules that get an adapter


class ColdStart(Section):
    """The stage `cold-start`, not in the paper: it teaches the form to models that do not emit it when asked."""

    seed: int | None  # Seed of its own, with which it is one model for all seeds of a run; null = the run's
    queries: Count  # Number of queries, each with one think and one direct-answer document; 0 turns the stage off
    within_range: bool  # Whether an answer is left out whose length is not what its query asks for
    epochs: Positive
    learning_rate: Rate
    lora: Lora
    batch_documents: Positive
    max_new_tokens: Positive
    temperature: Temperature


class WritingRM(Section):
    """Training of the Writing RM, a stage before the arms."""

    seed: int | None  # Seed of its own, with which it is one judge for all seeds of a run; null = the run's
    model: str
    pairs: str  # Source of preference pairs: `made` by the kit, a .jsonl file, or `hub:<dataset>`
    corpora: list[str]  # Sources of human passages, for pairs that are `made`
    passage_words: Positive
    passages_per_corpus: Positive
    queries: Positive  # Number of training queries that the model answers twice, for pairs that are `made`
    answer_tokens: Positive
    kinds: list[Literal["shuffled", "repeated", "padded", "truncated", "stuffed", "off_topic", "language_switched", "filler",
                        "human_model", "requirement"]] = Field(min_length=1)
    pairs_per_kind: Positive
    heldout_pairs_per_kind: Positive
    heldout_share: Annotated[float, Field(gt=0, lt=1)]  # Share of the sources that gives held-out pairs
    length_balanced: bool
    epochs: Positive
    learning_rate: Rate
    batch_pairs: Positive
    lora: Lora
    max_tokens: Positive
    fold_layout: bool  # Whether line breaks become spaces before a text is judged
    checkpoint_every_steps: Positive


class Sampling(Section):
    """Sampling of completions in `grpo` (and so in `distil`), and for the samples of an arm."""

    temperature: Temperature
    top_p: Rate
    max_new_tokens: Positive


class Decoding(Sampling):
    """Decoding of completions for an evaluation: each benchmark has its own."""

    top_k: Count = 0  # Number of tokens to choose from; 0 = all
    stop: list[str] = []  # Strings that end a completion: the first that comes


class Grpo(Section):
    """The stage `grpo`; `distil` writes with its sampling and chooses by its advantage."""

    steps: Positive
    group_size: Annotated[int, Field(ge=2)]
    queries_per_step: Positive
    micro_batch_completions: Positive
    learning_rate: Rate
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    warmup_steps: Count
    max_grad_norm: Annotated[float, Field(gt=0)]
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo"]
    clip_eps: Annotated[float, Field(gt=0, lt=1)]
    kl_beta: Annotated[float, Field(ge=0)]
    kl_bias_correction: bool  # Whether TRL weighs the KL term by the ratio of probabilities; false = the classic penalty
    importance_sampling: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]  # Correction for vLLM
    advantage: Literal["zscore", "minmax", "sum", "gdpo", "gate"]  # Mode of `advantage.MODES`
    advantage_clip: Annotated[float, Field(ge=0)]  # Largest size of a component's advantage, before the average; 0 = no limit
    mask_truncated: bool  # Whether a completion that was cut off at max_new_tokens is left out of the loss
    lora: Lora
    sampling: Sampling
    stop: list[str]  # Strings that end a completion, beside the model's own end of text
    gradient_checkpointing: bool
    checkpoint_every_steps: Positive
    kept_completions_per_step: Count
    trl: dict[str, Any]  # Fields of TRL's GRPOConfig that no other quantity sets, such as {entropy_coef: 0.001}

    @model_validator(mode="after")
    def _groups_and_batches(self):
        if not self.sampling.temperature:
            raise ValueError("grpo.sampling.temperature = 0 makes all completions of a group the same; it must be above 0")
        completions = self.group_size * self.queries_per_step
        if completions % self.micro_batch_completions:
            raise ValueError(f"group_size * queries_per_step = {completions} completions a step cannot be cut into "
                             f"micro-batches of {self.micro_batch_completions}; give a divisor of {completions}")
        return self

    @model_validator(mode="after")
    def _fields_of_trl(self):
        for field, value in self.trl.items():
            if field not in trl_knobs.FIELDS:
                raise ValueError(f"grpo.trl.{field}: TRL's GRPOConfig has no such field{nearest_name(field, trl_knobs.FREE)}")
            if problem := trl_knobs.problem(field, value):
                raise ValueError(f"grpo.trl.{field} = {value!r}: {problem}")
        low, high = (self.trl.get(f"vllm_importance_sampling_clip_{end}") for end in ("min", "max"))
        if low and low >= (high or 0):
            raise ValueError(f"grpo.trl.vllm_importance_sampling_clip_min = {low} needs a vllm_importance_sampling_clip_max "
                             "above it")
        return self


class Source(Section):
    """Source of documents, with its share of the plain tokens."""

    at: str  # Path or name: a file, a folder of files, `kit:shakespeare`, or `hub:<dataset>`
    language: Literal["en", "zh"]  # Language of the documents; those in another are left out
    weight: Annotated[float, Field(gt=0)]  # Weight relative to the other sources; the sum need not be 1


class Slurm(Section):
    """Settings of the corpus pipeline's tasks on a Slurm cluster: one core each."""

    partition: str
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]
    memory_gb: Positive


class Corpus(Section):
    """Documents for continual pretraining, and what is left out of them."""

    sources: list[Source] = Field(min_length=1)
    min_words: Positive
    max_words: Positive
    heldout_share: Annotated[float, Field(ge=0, lt=1)]  # Share of the documents kept out of training, for the perplexity
    decontaminate_words: Annotated[int, Field(ge=5)]  # Number of words in a row from a held-out query that exclude a document
    parts: Positive  # Number of parts per source; each is processed, and resumed, on its own
    workers: Positive  # Number of parts processed in parallel
    slurm: Slurm | None  # Cluster settings {partition: ..., time: ..., memory_gb: ...}; none = processes of this machine


class Cot(Section):
    """Long chain-of-thought documents, which a trained arm writes for training queries."""

    arm: str
    queries: Positive
    completions_per_query: Annotated[int, Field(ge=2)]  # Number of completions, of which the best by fused reward is kept
    batch_completions: Positive
    exact_only: bool  # Whether a completion that was cut off, or whose form is not exact, is left out


class Pretrain(Section):
    """The stages `pack` and `pretrain`: `tokens` are drawn from the corpus, packed into sequences, and gone through once."""

    tokens: Positive
    sequence_tokens: Positive
    batch_sequences: Positive  # Number of sequences per step, over all processes
    cot_token_fraction: Annotated[float, Field(ge=0, lt=1)]
    shards: Positive  # Number of files of packed sequences
    learning_rate: Rate
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    warmup_steps: Count
    checkpoint_every_steps: Positive
    heldout_tokens: Positive  # Number of tokens per source, for the perplexity before and after


class Sft(Section):
    """The baseline: supervised fine-tuning on long answers."""

    data: str  # Source of `messages`: a .jsonl file, `hub:<dataset>`, or `made` (best completions and human passages)
    human_passages: Count  # Number of human passages, for data that are `made`
    max_tokens: Positive
    epochs: Positive
    batch_sequences: Positive  # Number of sequences per step, each of up to max_tokens, packed with whole documents
    learning_rate: Rate
    lora: Lora
    checkpoint_every_steps: Positive


class Samples(Section):
    """Samples that an arm writes for held-out queries: the stages `samples-before`, `samples-during` and `samples-after`."""

    queries: Positive  # Number of held-out queries answered before and after RL
    batch_completions: Positive
    sampling: Sampling
    stop: list[str]


class Evaluation(Section):
    """Rating, in the arena, of what was written for the held-out queries."""

    every_steps: Count  # Number of RL steps between two ratings of the policy; 0 = before and after RL alone
    tie_margin: Annotated[float, Field(ge=0)]  # Largest difference of two Writing RM scores that is a tie, in notebook 09


class Arm(Section):
    """One arm of the comparison: where it starts, its prompt, its algorithm."""

    start: Literal["base", "continual-pretrain"]
    prompt: Literal["think", "direct"]
    algorithm: Literal["grpo", "sft"] = "grpo"
    change: dict[str, Any] = {}  # Other quantities for this arm alone, such as {reward.weights.format: 0.0}

    @model_validator(mode="after")
    def _plain_answers(self):
        if self.algorithm == "sft" and self.prompt != "direct":
            raise ValueError("an arm of algorithm sft needs prompt direct: its data hold answers, no plans")
        return self
