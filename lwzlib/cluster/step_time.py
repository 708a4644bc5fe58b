"""How long a GRPO step of a plan takes, and what bounds it: writing, weight sync, rewards, training, and the length tail.

Nothing is published on the paper's step time, so it is computed: each replica decodes its completions as vLLM does (slots
refill as completions end; a step reads all weights and all keys and values), and a training step waits for the longest
completion among the GPUs, because ZeRO gathers layer by layer. Lengths are quantiles of an assumed distribution. A simulated
second is an estimate; only a run on such GPUs measures one.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import beta

from lwzlib.cluster.disk import checkpoint_gb
from lwzlib.cluster.estimate import Line, Plan, constant, judge_shape, slots, total

_SEED = 0


class Step(NamedTuple):
    """Seconds of a step by part, in order; `tail_s` of writing had less than half of a replica's completions running, and
    `waiting_s` of training was spent waiting for the GPU with the longest completion."""

    lines: list[Line]
    tail_s: float
    waiting_s: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step: no part runs beside another."""
        return total(self.lines)

    @property
    def bound(self) -> Line:
        """The part that takes longest."""
        return max(self.lines, key=lambda line: line.value)


def lengths(plan: Plan) -> np.ndarray:
    """Tokens of a step's completions, in a fixed random order: quantiles of a Beta distribution on (0, max_new_tokens] with
    the plan's mean and, at half of the maximum, the spread of Beta(2, 2)."""
    longest = plan.recipe.grpo.sampling.max_new_tokens
    share = min(0.95, plan.mean_tokens / longest)
    quantiles = beta.ppf((np.arange(plan.completions) + 0.5) / plan.completions, 4 * share, 4 * (1 - share)) * longest
    return np.random.default_rng(_SEED).permutation(np.maximum(1, np.round(quantiles)))


def decode_s(plan: Plan, running: int, context: float) -> float:
    """Seconds of one decoding step of one replica with so many completions of a mean context: all weights, keys and values are
    read once, or the arithmetic takes longer; and an overhead that does not depend on the model."""
    served = plan.recipe.vllm.mode != "none"
    parallel = plan.recipe.vllm.tensor_parallel if served else 1
    width = plan.dtype_bytes if served else plan.stages["grpo"].weight_bytes
    read_bytes = plan.model.parameters * width + running * plan.model.kv_bytes(context, width)
    reading = read_bytes / (parallel * plan.gpu.bandwidth * constant("decode_bandwidth_share"))
    computing = plan.model.flops(running, context, 1) / (parallel * plan.gpu.flops * constant("prefill_flops_share"))
    return constant("decode_overhead_s" if served else "transformers_overhead_s") + max(reading, computing)


def replica_s(plan: Plan, tokens: np.ndarray, places: int) -> tuple[float, float]:
    """(seconds, of them with less than half of the places taken) until a replica has written completions of so many tokens.
    transformers starts all at once and computes the finished ones on."""
    refills, most = plan.recipe.vllm.mode != "none", min(places, len(tokens))
    queue, seconds, tail = list(tokens[most:]), 0.0, 0.0
    left, written = np.array(tokens[:most], float), np.zeros(most)
    while len(left):
        steps = left.min()  # until the next completion ends
        running = len(left) if refills else most
        took = steps * decode_s(plan, running, constant("prompt_tokens") + written.mean() + steps / 2)
        seconds, tail = seconds + took, tail + took * (len(left) < most / 2)
        left, written = left - steps, written + steps
        left, written = left[left > 0], written[left > 0]
        while queue and refills and len(left) < places:
            left, written = np.append(left, queue.pop()), np.append(written, 0)
    return seconds, tail


def writing_s(plan: Plan, tokens: np.ndarray) -> tuple[float, float]:
    """`replica_s` of the replica that takes longest."""
    return max(replica_s(plan, part, max(1, slots(plan))) for part in np.array_split(tokens, plan.replicas))


def _network(plan: Plan) -> float:
    """Bytes a second that reach a GPU from the others."""
    return constant("network_gbs" if plan.nodes[0] > 1 else "nvlink_gbs") * 1e9


def micro_s(plan: Plan, tokens: float, passes: int) -> float:
    """Seconds of `passes` forward passes (a backward pass is two) over a micro-batch on one GPU; communication runs beside
    the arithmetic, and the slower of the two counts."""
    context, zero = constant("prompt_tokens") + tokens, plan.recipe.distributed.zero
    operations = plan.model.flops(plan.recipe.grpo.micro_batch_completions * context, context / 2, passes)
    sent = 0.0  # parameters of which each GPU gets or sends its bytes
    if zero == 3:  # weights are gathered forward and backward, gradients scattered (arXiv 1910.02054, section 7)
        sent = (3 if passes > 1 else 1) * plan.model.parameters
    elif zero == 2 and passes > 1:
        sent = plan.trained
    return max(operations / (plan.gpu.flops * constant("train_flops_share")), sent * plan.dtype_bytes / _network(plan))


def training_s(plan: Plan, tokens: np.ndarray, passes: int, by_length: bool = False) -> tuple[float, float]:
    """(seconds, of them waiting) of a step's micro-batches: each lasts as long as the longest of its GPUs. `by_length`: each
    GPU takes its completions in order of length (`base.lean_grpo`)."""
    own = tokens.reshape(plan.training_gpus, -1)
    ordered = np.sort(own)[:, ::-1] if by_length else own
    rounds = ordered.reshape(plan.training_gpus, -1, plan.recipe.grpo.micro_batch_completions).max(2).T
    seconds = sum(micro_s(plan, gpus.max(), passes) for gpus in rounds)
    return seconds, seconds - sum(micro_s(plan, longest, passes) for longest in rounds.flat) / plan.training_gpus


def scoring(plan: Plan, tokens: np.ndarray) -> Line:
    """Seconds of the Writing RM: its arithmetic, or, sharded by ZeRO-3 beside the policy, the gathering of its weights."""
    if plan.recipe.reward.by_language_model:
        return Line("language model as judge", 0.0, f"NOT COUNTED: {plan.completions} completions by "
                    f"{plan.recipe.reward.writing.model}, as long as the server at reward.writing.url takes")
    recipe, judge, a_gpu = plan.recipe, judge_shape(plan.recipe), plan.completions / plan.training_gpus
    gpus = constant("rm_gpus") if recipe.reward.writing.url else plan.training_gpus
    billions = f"{judge.parameters / 1e9:.1f}e9 parameters"
    seconds = judge.flops(tokens.sum(), tokens.mean() / 2, 1) / (gpus * plan.gpu.flops * constant("prefill_flops_share"))
    gathering = a_gpu * judge.parameters * plan.dtype_bytes / _network(plan)
    if recipe.distributed.zero == 3 and not recipe.reward.writing.url and gathering > seconds:
        return Line("Writing RM", gathering, f"{a_gpu:.0f} texts a GPU, {billions} gathered for each")
    return Line("Writing RM", seconds, f"{tokens.sum() / 1e6:.1f}e6 tokens through {billions} on {gpus:.0f} GPUs")


def simulate_step(plan: Plan) -> Step:
    """The parts of a step, one after the other as TRL does them."""
    recipe, tokens = plan.recipe, lengths(plan)
    served, passes = recipe.vllm.mode != "none", 4 if recipe.grpo.gradient_checkpointing else 3
    seconds, tail = writing_s(plan, tokens)
    waiting = 0.0
    replicas = "1 replica" if plan.replicas == 1 else f"{plan.replicas} replicas"
    lines = [Line("writing", seconds, f"{plan.completions} completions of {tokens.mean():.0f} tokens (longest "
                  f"{tokens.max():.0f}) on {replicas}, up to {max(1, slots(plan))} at once each; the slowest replica")]
    if served:
        size = plan.model.parameters * plan.dtype_bytes / 1e9
        speed = constant("sync_gbs" if recipe.vllm.mode == "server" or recipe.distributed.zero == 3 else "nvlink_gbs")
        lines.append(Line("weight sync", size / speed, f"{size:.1f} GB / {speed:.0f} GB/s"))
    words, a_gpu = tokens.mean() * constant("words_token"), plan.completions / plan.training_gpus
    lines.append(Line("format and length reward", a_gpu * words * constant("format_us_word") / 1e6,
                      f"{a_gpu:.0f} completions a GPU x {words:.0f} words x {constant('format_us_word')} us; without the "
                      "sentence encoder"))
    if recipe.reward.weights.writing:
        lines.append(scoring(plan, tokens))
    if served:
        seconds, waiting = training_s(plan, tokens, 1)
        lines.append(Line("log-probabilities", seconds, "a forward pass: TRL corrects for vLLM's other numerics"))
    seconds, more = training_s(plan, tokens, passes, plan.recipe.grpo.loss != "bnpo")
    lines.append(Line("training", seconds, f"{passes} passes over {a_gpu:.0f} completions a GPU, {plan.training_gpus} GPUs; "
                      "the longest first; each micro-batch waits for its longest"))
    return Step(lines, tail, waiting + more)


def checkpoint(plan: Plan) -> Line:
    """Seconds to save a checkpoint of GRPO."""
    saved, speed = checkpoint_gb(plan), constant("checkpoint_gbs")
    return Line("checkpoint", saved.value / speed, f"{saved.how} / {speed:g} GB/s")
