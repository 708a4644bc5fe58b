"""Quantities of a recipe, section by section: types, bounds, and the meaning where the name does not say it."""

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

    name: str  # Path or name of a model: a folder, `kit:smollm2-135m-instruct`, `kit:tiny`, or a name on the hub
    dtype: Literal["bfloat16", "float32"]
    attention: Literal["eager", "sdpa", "flash_attention_2"]
    frame: Literal["plain", "chat"]  # Prompt frame: plain text for a base model, its chat template for an instruct model
    trust_remote_code: bool


class Data(Section):
    """Queries to train on, and held-out queries, which `corpus` keeps out of the documents; all stages read them."""

    train: str  # Source of queries: `kit:train`, `kit:train_short`, a .jsonl file, or `hub:<dataset>`
    heldout: str  # Source of queries, as in `train`
    languages: list[Literal["en", "zh"]] = Field(min_length=1)


class Prompt(Section):
    """Instruction that asks for the form: in `cold-start`, `sft`, `grpo`, `distil` and the samples of an arm."""

    wording: Literal["full", "brief"]
    worked_examples: Annotated[int, Field(ge=0, le=2)]


class ColdStart(Section):
    """The stage `cold-start`, not in the paper: one epoch teaches the form to models that do not emit it when asked."""

    queries: Count  # Number of queries, each with one think and one direct-answer document; 0 turns the stage off
    learning_rate: Rate
    batch_documents: Positive
    max_new_tokens: Positive
    temperature: Annotated[float, Field(gt=0, le=2)]


class LengthQuantities(Section):
    """Quantities of the length reward."""

    max_words: Positive  # `max` in the formula of the reward


class Lora(Section):
    """Adapter of `writing_rm`, `grpo` or `sft`; it is merged into the model at the end."""

    rank: Count  # Rank of the adapter; 0 = all weights are trained
    alpha: Positive
    targets: list[str] | Literal["all-linear"]  # Names of the modules that get an adapter


class WritingRM(Section):
    """Training of the Writing RM, a stage before the arms."""

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


class WritingQuantities(Section):
    """Quantities of the writing reward: the Writing RM, and where it scores."""

    model: str  # Writing RM: a folder that holds one, or `stage` for the one that this recipe trains
    url: str  # Address of a running `lwz serve-rm`; empty = score in the trainer's process
    patience_s: Positive  # Waiting time for a silent server


class FormatQuantities(Section):
    """Quantities of the format reward; the paper publishes neither the metric of repetition nor a threshold."""

    min_plan_words: Count  # Smallest length of a plan; with a shorter think segment the form is not exact
    encoder: str  # Sentence encoder of the semantic signal; empty = lexical signal alone
    encoder_languages: list[Literal["en", "zh"]]
    same_meaning: Annotated[float, Field(gt=0, le=1)]  # Cosine from which two runs of sentences say the same
    partial_credit: Annotated[float, Field(ge=0, lt=0.25)]  # Reward per tag, up to the first out of place; 0 = exact form only
    near_duplicate: Annotated[float, Field(gt=0, le=1)]  # Jaccard similarity from which two passages are duplicates
    tolerated_repetition: Annotated[float, Field(ge=0, lt=1)]  # Share of words that may repeat without penalty


class Weights(Section):
    """Weights of the rewards in the advantage; a reward of weight 0 is not computed."""

    length: Annotated[float, Field(ge=0)]
    writing: Annotated[float, Field(ge=0)]
    format: Annotated[float, Field(ge=0)]


class Reward(Section):
    """Rewards that `grpo` maximises; `distil` chooses by them, and they score the samples of an arm."""

    length: LengthQuantities
    writing: WritingQuantities
    format: FormatQuantities
    weights: Weights


class Sampling(Section):
    """Sampling of completions in `grpo` (and so in `distil`), and for the samples of an arm."""

    temperature: Annotated[float, Field(gt=0, le=2)]
    top_p: Rate
    max_new_tokens: Positive


class Decoding(Sampling):
    """Decoding of completions for an evaluation: each benchmark has its own."""

    temperature: Annotated[float, Field(ge=0, le=2)]  # Temperature of the softmax; 0 = greedy
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
    advantage: Literal["zscore", "minmax", "sum", "gdpo"]  # Mode of `advantage.MODES`
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


class Distributed(Section):
    """Spread of the training stages over GPUs, and when they save. Not part of a fingerprint: the method is the same."""

    nodes: Positive  # Number of nodes, those of vLLM servers included; more than 1 needs launch: slurm
    processes: Positive  # Number of processes per node, one per GPU
    zero: Literal[0, 2, 3]  # DeepSpeed ZeRO stage: 0 = off, each GPU holds all; 2 shards gradients and optimiser; 3 weights too
    offload: Literal["none", "optimizer", "all"]  # What moves to host memory: nothing, optimiser states, weights too
    checkpoint_every_minutes: Count  # Time between checkpoints, beside those by steps; 0 = off
    start_s: Positive  # Time limit for nodes and servers to answer

    @model_validator(mode="after")
    def _offloaded(self):
        if {"none": 0, "optimizer": 2, "all": 3}[self.offload] > self.zero:
            raise ValueError(f"offload = {self.offload!r} needs a higher ZeRO stage than zero = {self.zero}")
        return self


class Vllm(Section):
    """Engine that writes the completions of GRPO: transformers in the trainer, or vLLM beside it or on nodes of its own.
    With `server`, vLLM on all nodes also writes for `distil` and for the samples of an arm."""

    mode: Literal["none", "colocate", "server"]
    nodes: Count  # Number of nodes for `server`: the last ones of distributed.nodes
    tensor_parallel: Positive  # Number of GPUs that share one copy of the model
    memory_share: Rate  # Share of a GPU's memory, for weights and KV cache
    sleep: bool  # Whether `colocate` gives the memory back while training
