"""How long a GRPO step of a plan takes, and what bounds it: writing, weight sync, rewards, training, and the length tail.

Nothing is published on the paper's step time, so it is computed: each copy of the model decodes its completions as vLLM does
(slots refill as completions end; a step reads all weights and all keys and values), and a training step waits for the longest
completion among the GPUs, because ZeRO gathers layer by layer. Lengths are quantiles of an assumed distribution. A simulated
second is an estimate; only a run on such GPUs measures one.
"""

import dataclasses

import numpy as np
from scipy.stats import beta

from lwzlib.cluster.estimate import Line, Plan, c, shape, slots

_SEED = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of a step by part, in order; `tail_s` of writing had less than half of a copy's completions running, and
    `waiting_s` of training was spent waiting for the GPU with the longest completion."""

    lines: list[Line]
    tail_s: float
    waiting_s: float

    @property
    def seconds(self) -> float:
        """Of the whole step: no part runs beside another."""
        return sum(line.value for line in self.lines)

    @property
    def bound(self) -> Line:
        """The part that takes longest."""
        return max(self.lines, key=lambda line: line.value)


def lengths(p: Plan) -> np.ndarray:
    """Tokens of a step's completions, in a fixed random order: quantiles of a Beta distribution on (0, max_new_tokens] with
    the plan's mean and, at half of the maximum, the spread of Beta(2, 2)."""
    longest = p.recipe.grpo.sampling.max_new_tokens
    share = min(0.95, p.mean_tokens / longest)
    found = beta.ppf((np.arange(p.completions) + 0.5) / p.completions, 4 * share, 4 * (1 - share)) * longest
    return np.random.default_rng(_SEED).permutation(np.maximum(1, np.round(found)))


def decode_s(p: Plan, running: int, context: float) -> float:
    """Seconds of one decoding step of one copy with so many completions of a mean context: all weights, keys and values are
    read once, or the arithmetic takes longer; and an overhead that does not depend on the model."""
    served = p.recipe.vllm.mode != "none"
    parallel = p.recipe.vllm.tensor_parallel if served else 1
    read = p.model.parameters * p.dtype_bytes + running * p.model.kv_bytes(context, p.dtype_bytes)
    reading = read / (parallel * p.gpu.bandwidth * c("decode_bandwidth_share"))
    computing = p.model.flops(running, context, 1) / (parallel * p.gpu.flops * c("prefill_flops_share"))
    return c("decode_overhead_s" if served else "transformers_overhead_s") + max(reading, computing)


def copy_s(p: Plan, tokens: np.ndarray, places: int) -> tuple[float, float]:
    """(seconds, of them with less than half of the places taken) until a copy has written completions of so many tokens.
    transformers starts all at once and computes the finished ones on."""
    refills, most = p.recipe.vllm.mode != "none", min(places, len(tokens))
    queue, seconds, tail = list(tokens[most:]), 0.0, 0.0
    left, written = np.array(tokens[:most], float), np.zeros(most)
    while len(left):
        steps = left.min()
        running = len(left) if refills else most
        took = steps * decode_s(p, running, c("prompt_tokens") + written.mean() + steps / 2)
        seconds, tail = seconds + took, tail + took * (len(left) < most / 2)
        left, written = left - steps, written + steps
        left, written = left[left > 0], written[left > 0]
        while queue and refills and len(left) < places:
            left, written = np.append(left, queue.pop()), np.append(written, 0)
    return seconds, tail


def writing_s(p: Plan, tokens: np.ndarray) -> tuple[float, float]:
    """Of the copy that takes longest."""
    return max(copy_s(p, part, max(1, slots(p))) for part in np.array_split(tokens, p.copies))


def _network(p: Plan) -> float:
    """Bytes a second that reach a GPU from the others."""
    return (c("network_gbs") if p.nodes[0] > 1 else c("nvlink_gbs")) * 1e9


def micro_s(p: Plan, tokens: float, passes: int) -> float:
    """Seconds of `passes` forward passes (a backward pass is two) over a micro-batch on one GPU; communication runs beside
    the arithmetic, and the slower of the two counts."""
    r, w = p.recipe, p.dtype_bytes
    context = c("prompt_tokens") + tokens
    computing = p.model.flops(r.grpo.micro_batch_completions * context, context / 2, passes) / (
        p.gpu.flops * c("train_flops_share"))
    network = _network(p)
    if r.distributed.zero == 3:  # weights are gathered forward and backward, gradients scattered (arXiv 1910.02054, section 7)
        return max(computing, (3 if passes > 1 else 1) * p.model.parameters * w / network)
    return max(computing, p.trained * w / network if r.distributed.zero == 2 and passes > 1 else 0)


def training_s(p: Plan, tokens: np.ndarray, passes: int) -> tuple[float, float]:
    """(seconds, of them waiting) of a step's micro-batches: each lasts as long as the longest of its GPUs."""
    micro = p.recipe.grpo.micro_batch_completions
    longest = tokens.reshape(-1, micro).max(1) if micro > 1 else tokens
    rows = longest.reshape(-1, p.training_gpus)
    seconds = sum(micro_s(p, row.max(), passes) for row in rows)
    return seconds, seconds - float(sum(np.mean([micro_s(p, each, passes) for each in row]) for row in rows))


def simulate_step(p: Plan) -> Step:
    """The parts of a step, one after the other as TRL does them."""
    r, tokens, model = p.recipe, lengths(p), p.model
    served, passes = r.vllm.mode != "none", 4 if r.grpo.gradient_checkpointing else 3
    write, tail = writing_s(p, tokens)
    lines = [("writing", write, f"{p.completions} completions of {tokens.mean():.0f} tokens (longest {tokens.max():.0f}) on "
              f"{p.copies} {'copy' if p.copies == 1 else 'copies'}, up to {max(1, slots(p))} at once each; the slowest copy")]
    if served:
        size = model.parameters * p.dtype_bytes
        speed = c("sync_gbs") if r.vllm.mode == "server" or r.distributed.zero == 3 else c("nvlink_gbs")
        lines.append(("weight sync", size / speed / 1e9, f"{size / 1e9:.1f} GB / {speed:.0f} GB/s"))
    words = tokens.mean() * c("words_token")
    each = p.completions / p.training_gpus
    lines.append(("format and length reward", each * words * c("format_us_word") / 1e6,
                  f"{each:.0f} completions a GPU x {words:.0f} words x {c('format_us_word')} us; without the sentence encoder"))
    if r.reward.weights.writing:
        judge, on = shape(r.writing_rm.model), c("rm_gpus") if r.reward.writing.url else p.training_gpus
        scored = judge.flops(tokens.sum(), tokens.mean() / 2, 1) / (on * p.gpu.flops * c("prefill_flops_share"))
        how = f"{tokens.sum() / 1e6:.1f}e6 tokens through {judge.parameters / 1e9:.1f}e9 parameters on {on:.0f} GPUs"
        gathered = each * judge.parameters * p.dtype_bytes / _network(p)
        if r.distributed.zero == 3 and not r.reward.writing.url and gathered > scored:
            scored, how = gathered, f"{each:.0f} texts a GPU, {judge.parameters / 1e9:.1f}e9 parameters gathered for each"
        lines.append(("Writing RM", scored, how))
    waiting = 0.0
    if served:
        before, waiting = training_s(p, tokens, 1)
        lines.append(("log-probabilities", before, "a forward pass: TRL corrects for vLLM's other numerics"))
    seconds, more = training_s(p, tokens, passes)
    lines.append(("training", seconds, f"{passes} passes over {p.completions // p.training_gpus} completions a GPU, "
                  f"{p.training_gpus} GPUs; each micro-batch waits for its longest"))
    return Step([Line("a step", name, value, "s", how) for name, value, how in lines], tail, waiting + more)
