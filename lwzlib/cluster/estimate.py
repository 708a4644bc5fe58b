"""Whether GRPO of a recipe fits on given GPUs, before a job is submitted: memory here, time in `lwzlib.cluster.step_time`.

The paper names its hardware (8 nodes of 8 H800) and nothing of its cost. Memory follows the ZeRO paper's count (arXiv
1910.02054, section 3: 2 + 2 + 12 bytes a parameter in mixed precision) and what a decoder layer of this family keeps for its
backward pass. `texts/hardware.yaml` holds the numbers and their sources. Every line shows its arithmetic. No torch is imported.
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from lwzlib.base import models
from lwzlib.base.parallel import accumulation
from lwzlib.base.paths import TEXTS
from lwzlib.base.recipe import Recipe, RecipeError
from lwzlib.base.rows import read_yaml

GIB = 2**30
TRAINS, WRITES = "a GPU that trains", "a GPU that writes"


class Constant(NamedTuple):
    """A number that estimates rest on, and where it comes from."""

    value: float
    unit: str
    kind: str  # published, measured or assumed
    source: str


class Gpu(NamedTuple):
    """A kind of GPU; `gib` is its memory."""

    name: str
    gib: float
    flops: float  # dense bfloat16, a second
    bandwidth: float  # bytes a second


class Line(NamedTuple):
    """One step of the arithmetic: a value in GiB or s, and how it came about."""

    name: str
    value: float
    how: str


class Shape(NamedTuple):
    """Shape of a decoder of the Llama and Qwen2 family."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool  # the output matrix is the embedding
    attention_bias: bool = True

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of a layer."""
        return self.kv_heads * (self.hidden // self.heads)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{name: (in, out)} of the matrices of a layer."""
        h, kv, inner = self.hidden, self.kv_width, self.inner
        return {"q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h), "gate_proj": (h, inner),
                "up_proj": (h, inner), "down_proj": (inner, h)}

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer: its matrices, the biases of q, k and v where it has them, and two norms."""
        bias = self.attention_bias * (self.hidden + 2 * self.kv_width)
        return sum(a * b for a, b in self.linears.values()) + bias + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of all layers, the last norm, the embedding, and the output matrix unless it is tied."""
        return self.layers * self.layer_parameters + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def kv_bytes(self, tokens: float = 1, dtype_bytes: int = 2) -> float:
        """Bytes of the keys and values of all layers."""
        return 2 * self.layers * self.kv_width * dtype_bytes * tokens

    @property
    def kept_per_token(self) -> float:
        """Numbers that a layer keeps for its backward pass with a fused attention kernel: inputs of two norms and their float32
        copies, of the matrices, the attention's q, k, v and output, and of the gated activation."""
        return 10 * self.hidden + 2 * self.kv_width + 4 * self.inner

    def flops(self, tokens: float, context: float, passes: int) -> float:
        """Operations of `passes` forward passes (a backward pass is two): 2 per weight and token, and causal attention."""
        matrices = self.parameters - self.vocab * self.hidden * (0 if self.tied else 1)
        return passes * tokens * (2 * matrices + 2 * self.layers * self.hidden * context)


_DATA = read_yaml(TEXTS / "hardware.yaml")
CONSTANTS = {name: Constant(**fields) for name, fields in _DATA["constants"].items()}
GPUS = {name: Gpu(**fields) for name, fields in _DATA["gpus"].items()}
SHAPES = {name: Shape(*numbers) for name, numbers in _DATA["shapes"].items()}


def constant(name: str) -> float:
    """Value of a constant."""
    return CONSTANTS[name].value


@contextlib.contextmanager
def assuming(**values: float):
    """Give constants other values inside a `with` block."""
    before = dict(CONSTANTS)
    CONSTANTS.update({name: CONSTANTS[name]._replace(value=value) for name, value in values.items()})
    try:
        yield
    finally:
        CONSTANTS.update(before)


def shape_of(name: str) -> Shape:
    """Shape of a model in the table, or in a folder. Raises RecipeError for a hub model that is not in the table."""
    if name in SHAPES:
        return SHAPES[name]
    file = Path(models.resolve(name)) / "config.json"
    if not file.is_file():
        raise RecipeError(f"the shape of {name!r} is not known: give a folder with its config.json; known are "
                          f"{', '.join(SHAPES)}")
    config = json.loads(file.read_text())
    return Shape(config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"],
                 config["num_key_value_heads"], config["intermediate_size"], config["vocab_size"],
                 config.get("tie_word_embeddings", False), config.get("attention_bias", config.get("model_type") == "qwen2"))


class Plan(NamedTuple):
    """A recipe on a kind of GPU, with the sizes that both memory and time follow from."""

    recipe: Recipe
    gpu: Gpu
    mean_tokens: float  # of a completion
    model: Shape  # of the policy
    dtype_bytes: int  # of a weight
    nodes: tuple[int, int]  # that train, that serve vLLM
    training_gpus: int  # one per process
    gpus: int  # of all nodes, vLLM's servers included
    replicas: int  # of the model that generate in parallel
    completions: int  # of a GRPO step: group size times queries
    longest_tokens: int  # of a sequence: `max_new_tokens` after a prompt of assumed length
    trained: float  # parameters that have gradients


def make_plan(recipe: Recipe, gpu: Gpu, mean_tokens: float | None = None) -> Plan:
    """A checked plan. Raises RecipeError for a model whose shape is not known, RunError for a batch that cannot be cut."""
    where, vllm, grpo, model = recipe.distributed, recipe.vllm, recipe.grpo, shape_of(recipe.model.name)
    serving = vllm.nodes if vllm.mode == "server" else 0
    training_gpus = (where.nodes - serving) * where.processes
    accumulation(recipe, training_gpus)
    generating_gpus = serving * where.processes or training_gpus
    trained: float = model.parameters
    if grpo.lora.rank:
        names = model.linears if grpo.lora.targets == "all-linear" else grpo.lora.targets
        trained = model.layers * grpo.lora.rank * sum(sum(model.linears[name]) for name in names)
    longest = grpo.sampling.max_new_tokens
    return Plan(
        recipe, gpu, mean_tokens or constant("mean_share") * longest, model, 2 if recipe.model.dtype == "bfloat16" else 4,
        (where.nodes - serving, serving), training_gpus, where.nodes * where.processes,
        generating_gpus // (vllm.tensor_parallel if vllm.mode != "none" else 1), grpo.group_size * grpo.queries_per_step,
        longest + int(constant("prompt_tokens")), trained)


def training_memory(plan: Plan) -> list[Line]:
    """GiB of a GPU that trains, while it trains."""
    recipe, grpo, model, width = plan.recipe, plan.recipe.grpo, plan.model, plan.dtype_bytes
    zero, offload, lora = recipe.distributed.zero, recipe.distributed.offload, bool(grpo.lora.rank)
    weights_over, states_over = (plan.training_gpus if zero >= stage else 1 for stage in (3, 2))  # GPUs that share them
    state_bytes, states = (12, "float32 weights, two moments") if zero and width == 2 else (
        2 * width, "two moments in the weights' dtype")
    if lora:
        state_bytes, states = 12, "float32 adapter: its gradients are float32 too"
    gradient_bytes = 4 if lora else width
    weights, trained = f"{model.parameters / 1e9:.2f}e9 x {width} B / {weights_over}", f"{plan.trained / 1e9:.3g}e9"
    kept = model.kept_per_token * width
    token_bytes, token_parts = model.layers * kept, f"{model.layers} layers x {kept / 1e3:.0f} kB"
    if grpo.gradient_checkpointing:
        token_bytes = model.layers * model.hidden * width + kept
        token_parts = f"({model.layers} layers x {model.hidden} x {width} B + one layer's {kept / 1e3:.0f} kB)"
    tokens = grpo.micro_batch_completions * plan.longest_tokens
    lines = [
        ("weights", 0 if offload == "all" else model.parameters * width / weights_over, weights),
        ("gradients", plan.trained * gradient_bytes / states_over, f"{trained} x {gradient_bytes} B / {states_over}"),
        ("optimiser", 0, "in the host's memory") if offload != "none" else
        ("optimiser", plan.trained * state_bytes / states_over, f"{trained} x {state_bytes} B / {states_over} ({states})"),
        ("activations", tokens * token_bytes,
         f"{grpo.micro_batch_completions} x {plan.longest_tokens} tokens x {token_parts}"),
        ("logits", constant("logits_gib") * GIB, CONSTANTS["logits_gib"].source)]
    judge = shape_of(recipe.writing_rm.model) if recipe.reward.weights.writing and not recipe.reward.writing.url else None
    if zero == 3:
        layer = max(model.layer_parameters, judge.layer_parameters if judge else 0)
        lines.append(("gathered layers", 2 * layer * width, f"2 x {layer / 1e6:.0f}e6 x {width} B"))
    if grpo.kl_beta and not lora:
        lines.append(("reference model", model.parameters * width / weights_over, f"kl_beta > 0: {weights}"))
    if judge:
        lines.append(("Writing RM", judge.parameters * width / weights_over,
                      f"reward.writing.url is empty: {judge.parameters / 1e9:.2f}e9 x {width} B / {weights_over}"))
    return [Line(name, number / GIB, how) for name, number, how in lines]


def writing_memory(plan: Plan) -> list[Line]:
    """GiB of a GPU while completions are written: vLLM's share, or the whole model and the KV cache beside the trainer's."""
    vllm, width, model = plan.recipe.vllm, plan.dtype_bytes, plan.model
    staying = [line for line in training_memory(plan) if line.name in ("weights", "optimiser", "reference model", "Writing RM")]
    if vllm.mode == "none":
        completions = plan.completions / plan.training_gpus
        whole = model.parameters * width if plan.recipe.distributed.zero == 3 else 0
        cache = completions * model.kv_bytes(plan.longest_tokens, width)
        return [*staying, Line("whole model", whole / GIB, "ZeRO-3 gathers it to generate"),
                Line("KV cache", cache / GIB, f"{completions:.0f} x {plan.longest_tokens} tokens x "
                     f"{model.kv_bytes(dtype_bytes=width) / 1024:.0f} KiB")]
    weights = model.parameters * width / vllm.tensor_parallel / GIB
    lines = [Line("vLLM weights", weights, f"{model.parameters / 1e9:.2f}e9 x {width} B / {vllm.tensor_parallel}"),
             Line("vLLM KV cache", vllm.memory_share * plan.gpu.gib - weights,
                  f"{vllm.memory_share} x {plan.gpu.gib:.0f} - weights")]
    return lines if vllm.mode == "server" else [*staying, *lines]


def total(lines: list[Line]) -> float:
    """Sum of the lines' values."""
    return sum(line.value for line in lines)


def slots(plan: Plan) -> int:
    """Completions of mean length that a replica holds at once."""
    vllm = plan.recipe.vllm
    if vllm.mode == "none":
        return max(1, -(-plan.completions // plan.training_gpus))
    cache = next(line.value for line in writing_memory(plan) if line.name == "vLLM KV cache") * GIB
    return int(cache // (plan.model.kv_bytes(constant("prompt_tokens") + plan.mean_tokens, plan.dtype_bytes)
                         / vllm.tensor_parallel))


def problems(plan: Plan) -> list[str]:
    """Why the recipe cannot run on these GPUs; empty if it can, as far as arithmetic tells."""
    reasons, vllm, room = [], plan.recipe.vllm, plan.gpu.gib - constant("reserve_gib")
    training, writing = training_memory(plan), writing_memory(plan)
    beside = [line for line in writing if line.name.startswith("vLLM") and vllm.mode == "colocate" and not vllm.sleep]
    for group, lines, more in ((TRAINS, training, total(beside)), (WRITES, writing, 0)):
        if (need := total(lines) + more) > room:
            largest = max(lines, key=lambda line: line.value)
            reasons.append(f"{group} needs {need:.1f} GiB and has {room:.1f} ({plan.gpu.gib:.0f} less "
                           f"{constant('reserve_gib'):.0f} reserved); the largest part is {largest.name}, "
                           f"{largest.value:.1f} GiB: {largest.how}")
    if vllm.mode != "none" and slots(plan) < 1:
        reasons.append(f"vLLM's KV cache does not hold one completion; raise vllm.tensor_parallel = {vllm.tensor_parallel} or "
                       f"vllm.memory_share = {vllm.memory_share}")
    return reasons
