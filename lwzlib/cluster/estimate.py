"""Whether the stages of a recipe that train fit on given GPUs, before a job is submitted: memory. Time: `cluster.step_time`.

The paper names its hardware (8 nodes of 8 H800) and nothing of its cost. Memory follows the ZeRO paper's count (arXiv
1910.02054, section 3: 2 + 2 + 12 bytes a parameter in mixed precision), with gradients that are summed in float32, and what a
decoder layer of this family keeps for its backward pass. Without ZeRO all weights are float32 (`base.trainers`): 4 + 4 + 8.
`texts/hardware.yaml` holds the numbers and their sources. Every line shows its arithmetic. No torch is imported.
"""

import contextlib
from typing import NamedTuple

from lwzlib.base.kit import ModelError
from lwzlib.base.parallel import accumulation
from lwzlib.base.paths import TEXTS
from lwzlib.base.recipe import Recipe, RecipeError
from lwzlib.base.rows import read_yaml
from lwzlib.cluster.shapes import Shape, shape_of
from lwzlib.method.writing_rm import is_public
from lwzlib.pipeline.stages import places

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


_DATA = read_yaml(TEXTS / "hardware.yaml")
CONSTANTS = {name: Constant(**fields) for name, fields in _DATA["constants"].items()}
GPUS = {name: Gpu(**fields) for name, fields in _DATA["gpus"].items()}


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


class Stage(NamedTuple):
    """A stage that trains, as each of its GPUs sees it."""

    model: Shape
    trained: int  # parameters that have gradients
    sequences: int  # of a micro-batch
    tokens: int  # of a sequence, at most
    gpus: int  # that train together, one per process
    zero: int  # 0 too where the stage is one process
    weight_bytes: int  # of a weight while it trains: 4 for all weights without ZeRO, else those of the recipe's dtype

    @property
    def adapter(self) -> bool:
        """Whether an adapter is trained, in float32, on weights that stay as they are."""
        return self.trained < self.model.parameters


class Plan(NamedTuple):
    """A recipe on a kind of GPU, with the sizes that both memory and time follow from."""

    recipe: Recipe
    gpu: Gpu
    mean_tokens: float  # of a completion
    model: Shape  # of the policy
    dtype_bytes: int  # of a weight, where it is not trained: in vLLM, in a saved model
    nodes: tuple[int, int]  # that train, that serve vLLM
    training_gpus: int  # of GRPO, one per process
    gpus: int  # of all nodes, vLLM's servers included
    replicas: int  # of the model that generate in parallel
    completions: int  # of a GRPO step: group size times queries
    longest_tokens: int  # of a sequence: `max_new_tokens` after a prompt of assumed length
    stages: dict[str, Stage]  # GRPO, and the others that train in this recipe, in their order

    @property
    def trained(self) -> int:
        """Parameters of the policy that have gradients in GRPO."""
        return self.stages["grpo"].trained


def make_plan(recipe: Recipe, gpu: Gpu, mean_tokens: float | None = None) -> Plan:
    """A checked plan. Raises RecipeError for a model whose shape is not known, RunError for a batch that cannot be cut."""
    where, vllm, grpo = recipe.distributed, recipe.vllm, recipe.grpo
    serving = vllm.nodes if vllm.mode == "server" else 0
    training_gpus = (where.nodes - serving) * where.processes
    accumulation(recipe, training_gpus)
    generating_gpus = serving * where.processes or training_gpus
    longest = grpo.sampling.max_new_tokens
    return Plan(
        recipe, gpu, mean_tokens or constant("mean_share") * longest, shape_of(recipe.model.name), _dtype_bytes(recipe),
        (where.nodes - serving, serving), training_gpus, where.nodes * where.processes,
        generating_gpus // (vllm.tensor_parallel if vllm.mode != "none" else 1), grpo.group_size * grpo.queries_per_step,
        longest + int(constant("prompt_tokens")), _stages(recipe, training_gpus))


def _dtype_bytes(recipe: Recipe) -> int:
    return 2 if recipe.model.dtype == "bfloat16" else 4


def _stages(recipe: Recipe, grpo_gpus: int) -> dict[str, Stage]:
    """The stages of the recipe that train. The cold start is one process; vLLM's nodes train too where GRPO does not run."""
    cold, judge, grpo, sft = recipe.cold_start, recipe.writing_rm, recipe.grpo, recipe.sft
    prompt, gpus = int(constant("prompt_tokens")), recipe.distributed.nodes * recipe.distributed.processes
    table = {  # model, adapter, sequences of a micro-batch, tokens of each, GPUs
        "cold-start": (recipe.model.name, cold.lora, cold.batch_documents, prompt + cold.max_new_tokens, 1),
        "writing-rm": (judge.model, judge.lora, 2 * judge.batch_pairs, judge.max_tokens, gpus),
        "pretrain": (recipe.model.name, None, 1, recipe.pretrain.sequence_tokens, gpus),
        "grpo": (recipe.model.name, grpo.lora, grpo.micro_batch_completions, prompt + grpo.sampling.max_new_tokens, grpo_gpus),
        "sft": (recipe.model.name, sft.lora, sft.batch_sequences, sft.max_tokens, gpus)}
    wanted, stages = {"grpo"} | {name for _, name in places(recipe)}, {}
    for name, (model, lora, sequences, tokens, count) in table.items():
        if name in wanted:
            shape, zero = shape_of(model), recipe.distributed.zero if name != "cold-start" else 0
            weight_bytes = _dtype_bytes(recipe) if zero or (lora and lora.rank) else 4
            stages[name] = Stage(shape, shape.trained(lora), sequences, tokens, count, zero, weight_bytes)
    return stages


def judge_shape(recipe: Recipe) -> Shape:
    """Shape of the reward model that judges; for a public one of unknown shape, that of the model which the recipe would train
    as its Writing RM stands in."""
    if is_public(recipe):
        with contextlib.suppress(RecipeError, ModelError):
            return shape_of(recipe.reward.writing.model)
    return shape_of(recipe.writing_rm.model)


def training_memory(plan: Plan, stage: str = "grpo") -> list[Line]:
    """GiB of a GPU that trains in this stage, while it trains."""
    at, recipe = plan.stages[stage], plan.recipe
    offload = recipe.distributed.offload if at.zero else "none"
    weights_over, states_over = (at.gpus if at.zero >= least else 1 for least in (3, 2))  # GPUs that share them
    state_bytes, states = (12, "float32 weights, two moments") if at.zero or at.adapter else (8, "two moments")
    weights = f"{at.model.parameters / 1e9:.2f}e9 x {at.weight_bytes} B / {weights_over}"
    trained = f"{at.trained / 1e9:.3g}e9"
    lines = [
        ("weights", 0 if offload == "all" else at.model.parameters * at.weight_bytes / weights_over, weights),
        ("gradients", at.trained * 4 / states_over, f"{trained} x 4 B / {states_over}, summed in float32"),
        ("optimiser", 0, "in the host's memory") if offload != "none" else
        ("optimiser", at.trained * state_bytes / states_over, f"{trained} x {state_bytes} B / {states_over} ({states})"),
        *_working_memory(plan, at)]
    if stage != "writing-rm":  # which has one number a text
        lines.append(("logits", constant("logits_gib") * GIB, CONSTANTS["logits_gib"].source))
    judge = None
    if stage == "grpo" and recipe.reward.weights.writing and not recipe.reward.writing.url:
        judge = judge_shape(recipe)
        lines.append(("Writing RM", judge.parameters * plan.dtype_bytes / weights_over, "reward.writing.url is empty: "
                      f"{judge.parameters / 1e9:.2f}e9 x {plan.dtype_bytes} B / {weights_over}"))
    if stage == "grpo" and recipe.grpo.kl_beta and not at.adapter:
        lines.append(("reference model", at.model.parameters * at.weight_bytes / weights_over, f"kl_beta > 0: {weights}"))
    if at.zero == 3:
        layer = max(at.model.layer_parameters, judge.layer_parameters if judge else 0)
        lines.append(("gathered layers", 2 * layer * plan.dtype_bytes, f"2 x {layer / 1e6:.0f}e6 x {plan.dtype_bytes} B"))
    return [Line(name, number / GIB, how) for name, number, how in lines]


def _working_memory(plan: Plan, at: Stage) -> list[tuple[str, float, str]]:
    """Bytes of a micro-batch, and of the copies that autocast makes of float32 weights."""
    autocast, layers = at.weight_bytes > plan.dtype_bytes, at.model.layers
    kept = at.model.kept_bytes(plan.dtype_bytes, autocast)
    token_bytes, token_parts = layers * kept, f"{layers} layers x {kept / 1e3:.0f} kB"
    if plan.recipe.grpo.gradient_checkpointing:
        token_bytes = layers * at.model.hidden * at.weight_bytes + kept
        token_parts = f"({layers} layers x {at.model.hidden} x {at.weight_bytes} B + one layer's {kept / 1e3:.0f} kB)"
    copies = f"of the matrices: {at.model.matrices / 1e9:.2f}e9 x {plan.dtype_bytes} B"
    return [("activations", at.sequences * at.tokens * token_bytes, f"{at.sequences} x {at.tokens} tokens x {token_parts}"),
            *[("autocast copies", at.model.matrices * plan.dtype_bytes, copies)] * autocast]


def writing_memory(plan: Plan) -> list[Line]:
    """GiB of a GPU while completions are written: vLLM's share, or the whole model and the KV cache beside the trainer's."""
    vllm, width, model = plan.recipe.vllm, plan.dtype_bytes, plan.model
    staying = [line for line in training_memory(plan) if line.name in ("weights", "optimiser", "reference model", "Writing RM")]
    if vllm.mode == "none":
        completions, cache_bytes = plan.completions / plan.training_gpus, plan.stages["grpo"].weight_bytes
        whole = model.parameters * width if plan.recipe.distributed.zero == 3 else 0
        cache = completions * model.kv_bytes(plan.longest_tokens, cache_bytes)
        return [*staying, Line("whole model", whole / GIB, "ZeRO-3 gathers it to generate"),
                Line("KV cache", cache / GIB, f"{completions:.0f} x {plan.longest_tokens} tokens x "
                     f"{model.kv_bytes(dtype_bytes=cache_bytes) / 1024:.0f} KiB")]
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


def problems(plan: Plan, *stages: str) -> list[str]:
    """Why these stages, or all that train, cannot run on these GPUs; empty if they can, as far as arithmetic tells."""
    reasons, vllm, room = [], plan.recipe.vllm, plan.gpu.gib - constant("reserve_gib")
    stages, writing = stages or tuple(plan.stages), writing_memory(plan)
    groups = [(f"{name}: {TRAINS}", training_memory(plan, name)) for name in stages]
    if "grpo" in stages:
        groups.append((f"grpo: {WRITES}", writing))
    for group, lines in groups:
        beside = vllm.mode == "colocate" and not vllm.sleep and group == f"grpo: {TRAINS}"
        lines = lines + [line for line in writing if beside and line.name.startswith("vLLM")]
        if (need := total(lines)) > room:
            largest = max(lines, key=lambda line: line.value)
            reasons.append(f"{group} needs {need:.1f} GiB and has {room:.1f} ({plan.gpu.gib:.0f} less "
                           f"{constant('reserve_gib'):.0f} reserved); the largest part is {largest.name}, "
                           f"{largest.value:.1f} GiB: {largest.how}")
    if vllm.mode != "none" and slots(plan) < 1:
        reasons.append(f"vLLM's KV cache does not hold one completion; raise vllm.tensor_parallel = {vllm.tensor_parallel} or "
                       f"vllm.memory_share = {vllm.memory_share}")
    return reasons
