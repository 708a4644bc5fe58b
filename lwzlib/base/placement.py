"""Where a recipe runs: GPUs, sharding, vLLM; and its trackers. Not part of a fingerprint: the method is the same everywhere."""

from typing import Literal

from pydantic import model_validator

from lwzlib.base.quantities import Count, Positive, Rate, Section


class Distributed(Section):
    """Spread of the training stages over GPUs, and when they save."""

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
    With either, vLLM on all nodes also writes for `distil` and for the samples of an arm."""

    mode: Literal["none", "colocate", "server"]
    nodes: Count  # Number of nodes for `server`: the last ones of distributed.nodes
    tensor_parallel: Positive  # Number of GPUs that share one copy of the model
    memory_share: Rate  # Share of a GPU's memory, for weights and KV cache
    sleep: bool  # Whether `colocate` gives the memory back while training


class Tracking(Section):
    """Trackers that get each row of the stages that train, beside `metrics.jsonl`."""

    report_to: list[Literal["tensorboard", "trackio", "wandb"]]
