"""The quantities of a recipe, section by section: types, bounds, and what each means where its name does not say it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Quantities that belong together; unknown names, other types, NaN and infinity are refused, and all is frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The base model of all stages; the Writing RM is trained in its dtype and frame."""

    name: str  # `kit:smollm2-135m-instruct`, `kit:tiny`, a folder, or a hub name
    dtype: Literal["bfloat16", "float32"]
    attention: Literal["eager", "sdpa", "flash_attention_2"]
    frame: Literal["plain", "chat"]  # a base model takes a plain-text frame, an instruct model its chat template
    trust_remote_code: bool


class Data(Section):
    """Read by all stages: queries to train on, and queries held out, which `corpus` keeps out of the documents."""

    train: str  # `kit:train`, `kit:train_short`, a .jsonl file, or `hub:<dataset>`
    heldout: str
    languages: list[Literal["en", "zh"]] = Field(min_length=1)


class Prompt(Section):
    """How the form is asked for: by `cold-start`, `sft`, `grpo`, `distil` and the samples of an arm."""

    wording: Literal["full", "brief"]
    worked_examples: Annotated[int, Field(ge=0, le=2)]


class ColdStart(Section):
    """The stage `cold-start`, not in the paper: one epoch teaches the form to models that do not emit it when asked."""

    queries: Count  # 0 turns the stage off; each gives one think and one direct-answer document
    learning_rate: Rate
    batch_documents: Positive
    max_new_tokens: Positive
    temperature: Annotated[float, Field(gt=0, le=2)]


class LengthQuantities(Section):
    """Of the length reward: `max_words` is `max` in its formula."""

    max_words: Positive


class Lora(Section):
    """The adapter of `writing_rm`, of `grpo` or of `sft`; it is merged into the model at the end."""

    rank: Count  # 0 = all weights are trained
    alpha: Positive
    targets: list[str] | Literal["all-linear"]  # names of the modules that get an adapter


class WritingRM(Section):
    """How the Writing RM is trained: a stage before the arms."""

    model: str
    pairs: str  # `made` by the kit, a .jsonl file, or `hub:<dataset>`
    corpora: list[str]  # for `made`: where human passages come from
    passage_words: Positive
    passages_per_corpus: Positive
    queries: Positive  # for `made`: the model answers each of so many training queries twice
    answer_tokens: Positive
    kinds: list[Literal["shuffled", "repeated", "padded", "truncated", "stuffed", "off_topic", "language_switched", "filler",
                        "human_model", "requirement"]] = Field(min_length=1)
    pairs_per_kind: Positive
    heldout_pairs_per_kind: Positive
    heldout_share: Annotated[float, Field(gt=0, lt=1)]  # of the sources
    length_balanced: bool
    epochs: Positive
    learning_rate: Rate
    batch_pairs: Positive
    lora: Lora
    max_tokens: Positive
    fold_layout: bool  # line breaks become spaces before a text is judged
    checkpoint_every_steps: Positive


class WritingQuantities(Section):
    """Of the writing reward: the Writing RM, and where it scores."""

    model: str  # `stage`: the one that this recipe trains; or a folder with a Writing RM
    url: str  # of a running `lwz serve-rm`; empty = score in the trainer's process
    patience_s: Positive  # how long a silent server is waited for


class FormatQuantities(Section):
    """Of the format reward; the paper publishes neither the metric of repetition nor a threshold."""

    min_plan_words: Count  # a think segment with fewer is no plan, and the form not exact
    encoder: str  # sentence encoder of the semantic signal; empty = lexical alone
    encoder_languages: list[Literal["en", "zh"]]
    same_meaning: Annotated[float, Field(gt=0, le=1)]  # cosine from which two runs of sentences say the same
    partial_credit: Annotated[float, Field(ge=0, lt=0.25)]  # per tag, up to the first out of place; 0 = exact form only
    near_duplicate: Annotated[float, Field(gt=0, le=1)]  # Jaccard similarity from which two passages are duplicates
    tolerated_repetition: Annotated[float, Field(ge=0, lt=1)]  # share of words that may repeat without penalty


class Weights(Section):
    """Of the rewards in the advantage; one of weight 0 is not computed."""

    length: Annotated[float, Field(ge=0)]
    writing: Annotated[float, Field(ge=0)]
    format: Annotated[float, Field(ge=0)]


class Reward(Section):
    """What `grpo` maximises; by it `distil` chooses, and the samples of an arm are scored."""

    length: LengthQuantities
    writing: WritingQuantities
    format: FormatQuantities
    weights: Weights


class Sampling(Section):
    """How completions are drawn: in `grpo` (and so in `distil`), and for the samples of an arm."""

    temperature: Annotated[float, Field(gt=0, le=2)]
    top_p: Rate
    max_new_tokens: Positive


class Decoding(Sampling):
    """How completions are written for an evaluation: each benchmark has its own."""

    temperature: Annotated[float, Field(ge=0, le=2)]  # 0 = greedy
    top_k: Count = 0  # 0 = off
    stop: list[str] = []  # a completion ends with the first of them


class Grpo(Section):
    """The stage `grpo`; `distil` writes with its sampling and chooses by its advantage, a mode of `advantage.MODES`."""

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
    advantage: Literal["zscore", "minmax", "sum", "gdpo"]
    lora: Lora
    sampling: Sampling
    gradient_checkpointing: bool
    checkpoint_every_steps: Positive
    kept_completions_per_step: Count

    @model_validator(mode="after")
    def _whole_batches(self):
        completions = self.group_size * self.queries_per_step
        if completions % self.micro_batch_completions:
            raise ValueError(f"group_size * queries_per_step = {completions} completions a step cannot be cut into "
                             f"micro-batches of {self.micro_batch_completions}; give a divisor of {completions}")
        return self


class Source(Section):
    """Where documents come from, and their share of the plain tokens (weights need not sum to 1)."""

    at: str  # `kit:shakespeare`, a file, a folder of files, or `hub:<dataset>`
    language: Literal["en", "zh"]  # documents in another language are left out
    weight: Annotated[float, Field(gt=0)]


class Slurm(Section):
    """Where the tasks of the corpus pipeline run on a cluster: one core each."""

    partition: str
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]
    memory_gb: Positive


class Corpus(Section):
    """What is read for continual pretraining, and what is left out of it."""

    sources: list[Source] = Field(min_length=1)
    min_words: Positive
    max_words: Positive
    heldout_share: Annotated[float, Field(ge=0, lt=1)]  # of the documents: not trained on, for the perplexity
    decontaminate_words: Annotated[int, Field(ge=5)]  # so many words in a row shared with a held-out query are too many
    parts: Positive  # of each source; each is worked on, and resumed, apart
    workers: Positive  # parts at a time
    slurm: Slurm | None  # {partition: ..., time: ..., memory_gb: ...}; none = processes of this machine


class Cot(Section):
    """The long chain-of-thought documents: what a trained arm writes for training queries."""

    arm: str
    queries: Positive
    completions_per_query: Annotated[int, Field(ge=2)]  # the best by fused reward is kept
    batch_completions: Positive
    exact_only: bool  # a completion that was cut off, or whose form is not exact, is no document


class Pretrain(Section):
    """The stages `pack` and `pretrain`: `tokens` are drawn from the corpus, packed into sequences, and gone through once."""

    tokens: Positive
    sequence_tokens: Positive
    batch_sequences: Positive  # a step, over all processes
    cot_token_fraction: Annotated[float, Field(ge=0, lt=1)]
    shards: Positive  # files of packed sequences
    learning_rate: Rate
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    warmup_steps: Count
    checkpoint_every_steps: Positive
    heldout_tokens: Positive  # of each source, for the perplexity before and after


class Sft(Section):
    """The baseline: supervised fine-tuning on long answers."""

    data: str  # `made`: the best completions and human passages; a .jsonl file or `hub:<dataset>` of `messages`
    human_passages: Count  # for `made`
    max_tokens: Positive
    epochs: Positive
    batch_sequences: Positive  # each of up to max_tokens, with whole documents packed into it
    learning_rate: Rate
    lora: Lora
    checkpoint_every_steps: Positive


class Samples(Section):
    """The stages `samples-before`, `samples-during` and `samples-after`: what an arm writes for held-out queries."""

    queries: Positive  # held-out queries written before and after RL
    batch_completions: Positive
    sampling: Sampling
    stop: list[str]


class Evaluation(Section):
    """How the arena rates what was written for the held-out queries."""

    every_steps: Count  # RL steps between two ratings of the policy; 0 = before and after RL alone
    tie_margin: Annotated[float, Field(ge=0)]  # in notebook 09: Writing RM scores that differ by no more are a tie


class Arm(Section):
    """`change` sets other quantities for this arm alone: {reward.weights.format: 0.0}."""

    start: Literal["base", "continual-pretrain"]
    prompt: Literal["think", "direct"]
    algorithm: Literal["grpo", "sft"] = "grpo"
    change: dict[str, Any] = {}

    @model_validator(mode="after")
    def _plain_answers(self):
        if self.algorithm == "sft" and self.prompt != "direct":
            raise ValueError("an arm of algorithm sft needs prompt direct: its data hold answers, no plans")
        return self


class Distributed(Section):
    """How stages that train are spread over GPUs, and when they save. Not part of a fingerprint: the method is the same."""

    nodes: Positive  # all of them, those of vLLM servers included; more than 1 needs launch: slurm
    processes: Positive  # on each node, one a GPU
    zero: Literal[0, 2, 3]  # DeepSpeed ZeRO: 0 off, every GPU holds all; 2 shards gradients and optimiser, 3 weights too
    offload: Literal["none", "optimizer", "all"]  # to the memory of the host: nothing, optimiser states, weights too
    checkpoint_every_minutes: Count  # beside the checkpoints by steps; 0 = off
    start_s: Positive  # how long nodes and servers may take to answer

    @model_validator(mode="after")
    def _offloaded(self):
        if {"none": 0, "optimizer": 2, "all": 3}[self.offload] > self.zero:
            raise ValueError(f"offload = {self.offload!r} needs a higher ZeRO stage than zero = {self.zero}")
        return self


class Vllm(Section):
    """Who writes the completions of GRPO: transformers in the trainer, or vLLM beside it or on nodes of its own. With
    `server`, vLLM on all nodes also writes for `distil` and for the samples of an arm."""

    mode: Literal["none", "colocate", "server"]
    nodes: Count  # for `server`: so many of distributed.nodes, the last ones
    tensor_parallel: Positive  # GPUs that share one copy of the model
    memory_share: Rate  # of a GPU's memory, for weights and KV cache
    sleep: bool  # for `colocate`: give the memory back while training
