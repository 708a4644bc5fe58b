"""What a recipe's GRPO needs of given GPUs, before a job is submitted: memory here, time in `lwzlib.cluster.step_time`.

The paper names its hardware (8 nodes of 8 H800) and nothing of its cost. Memory follows the ZeRO paper's count (arXiv
1910.02054, section 3: 2 + 2 + 12 bytes a parameter in mixed precision) and what a decoder layer of this family keeps for its
backward pass. Every line shows its arithmetic. No torch is imported.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

from lwzlib.base import models
from lwzlib.base.parallel import accumulation
from lwzlib.base.recipe import Recipe, RecipeError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number that estimates rest on, and where it comes from."""

    value: float
    unit: str
    kind: str  # published, measured or assumed
    source: str


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What estimates ask of a GPU; `gib` is its memory."""

    name: str
    gib: float
    flops: float  # dense bfloat16, a second
    bandwidth: float  # bytes a second


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder of the Llama and Qwen2 family."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool
    attention_bias: bool = True

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{name: (in, out)} of the matrices of a layer."""
        h, kv = self.hidden, self.kv_heads * self.head
        return {"q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h), "gate_proj": (h, self.inner),
                "up_proj": (h, self.inner), "down_proj": (self.inner, h)}

    @property
    def layer_parameters(self) -> int:
        """The matrices of a layer, their biases of q, k and v where it has them, and two norms."""
        bias = self.attention_bias * (self.hidden + 2 * self.kv_heads * self.head)
        return sum(a * b for a, b in self.linears.values()) + bias + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All layers, the last norm, the embedding, and the output matrix unless it is `tied` to the embedding."""
        return self.layers * self.layer_parameters + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def kv_bytes(self, tokens: float = 1, dtype_bytes: int = 2) -> float:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head * dtype_bytes * tokens

    @property
    def kept_per_token(self) -> float:
        """Numbers that a layer keeps for its backward pass with a fused attention kernel: inputs of two norms and their float32
        copies, of the matrices, the attention's q, k, v and output, and of the gated activation."""
        return 10 * self.hidden + 2 * self.kv_heads * self.head + 4 * self.inner

    def flops(self, tokens: float, context: float, passes: int) -> float:
        """Of `passes` forward passes (a backward pass counts for two): 2 a weight and token, and causal attention."""
        matrices = self.parameters - self.vocab * self.hidden * (0 if self.tied else 1)
        return passes * tokens * (2 * matrices + 2 * self.layers * self.hidden * context)


C = {
    "decode_bandwidth_share": Constant(0.76, "of the memory bandwidth", "published",
                                       "fit to Qwen2.5's speeds with vLLM on A100, its documentation's speed benchmark"),
    "decode_overhead_s": Constant(0.0027, "s a decoding step", "published", "the same fit"),
    "network_gbs": Constant(50, "GB/s a GPU", "published", "400 Gb/s InfiniBand a GPU of an H800 node (arXiv 2412.19437)"),
    "transformers_overhead_s": Constant(0.021, "s a decoding step", "published", "the same page: Qwen2.5-0.5B, transformers"),
    "nvlink_gbs": Constant(160, "GB/s a GPU", "published", "inside an H800 node (arXiv 2412.19437)"),
    "format_us_word": Constant(0.6, "microseconds a word", "measured", "benchmarks/reward_throughput.md, honest, 10,000 words"),
    "train_flops_share": Constant(0.35, "of peak", "assumed", "Llama 3 405B: 0.38 to 0.43 published (arXiv 2407.21783)"),
    "prefill_flops_share": Constant(0.5, "of peak", "assumed", "forward passes over long texts"),
    "sync_gbs": Constant(10, "GB/s", "assumed", "one rank gathers and broadcasts all weights, tensor after tensor"),
    "reserve_gib": Constant(4, "GiB", "assumed", "CUDA context, NCCL, fragmentation, the sentence encoder"),
    "logits_gib": Constant(0.5, "GiB", "assumed", "TRL 1.16 makes logits in chunks, never all of them"),
    "mean_share": Constant(0.5, "of max_new_tokens", "assumed", "the paper gives no mean; --mean-tokens sets it"),
    "prompt_tokens": Constant(1024, "tokens", "assumed", "frame and query"),
    "words_token": Constant(0.75, "words a token", "assumed", "English prose"),
    "rm_gpus": Constant(8, "GPUs", "assumed", "of a served Writing RM (reward.writing.url), beside the recipe's own"),
}
GPUS = {  # NVIDIA's data sheets
    "h800": Gpu("H800", 80, 989e12, 3.35e12), "h100": Gpu("H100", 80, 989e12, 3.35e12),
    "a100": Gpu("A100", 80, 312e12, 2.039e12), "h200": Gpu("H200", 141 * 1e9 / GIB, 989e12, 4.8e12)}
SHAPES = {  # config.json of each model on the hub
    "Qwen/Qwen2.5-0.5B": Shape(24, 896, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": Shape(28, 1536, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B": Shape(36, 2048, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": Shape(28, 3584, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B": Shape(48, 5120, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B": Shape(64, 5120, 40, 8, 27648, 152064, False),
    "Qwen/Qwen2.5-72B": Shape(80, 8192, 64, 8, 29568, 152064, False),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One step of the arithmetic: a value in `unit` (GiB, s, ...), how it came about, and of which group it is a part."""

    group: str
    name: str
    value: float
    unit: str
    how: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a recipe runs, with the sizes that both memory and time follow from."""

    recipe: Recipe
    gpu: Gpu
    mean_tokens: float

    @property
    def model(self) -> Shape:
        """Shape of the model that is trained. Raises RecipeError where it is not known."""
        return shape(self.recipe.model.name)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight in the model's dtype: 2 in bfloat16, 4 in float32."""
        return 2 if self.recipe.model.dtype == "bfloat16" else 4

    @property
    def nodes(self) -> tuple[int, int]:
        """(that train, that serve)"""
        served = self.recipe.vllm.nodes if self.recipe.vllm.mode == "server" else 0
        return self.recipe.distributed.nodes - served, served

    @property
    def training_gpus(self) -> int:
        """Those of the nodes that train, one a process."""
        return self.nodes[0] * self.recipe.distributed.processes

    @property
    def gpus(self) -> int:
        """Those of all nodes, vLLM's servers included."""
        return sum(self.nodes) * self.recipe.distributed.processes

    @property
    def copies(self) -> int:
        """Of the model that write completions at the same time."""
        vllm = self.recipe.vllm
        writing = self.nodes[1] * self.recipe.distributed.processes if vllm.mode == "server" else self.training_gpus
        return writing // (vllm.tensor_parallel if vllm.mode != "none" else 1)

    @property
    def completions(self) -> int:
        """A GRPO step writes so many: group size times queries."""
        return self.recipe.grpo.group_size * self.recipe.grpo.queries_per_step

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: `max_new_tokens` after a prompt of assumed length."""
        return self.recipe.grpo.sampling.max_new_tokens + int(c("prompt_tokens"))

    @property
    def trained(self) -> float:
        """Parameters that have gradients."""
        lora, model = self.recipe.grpo.lora, self.model
        if not lora.rank:
            return model.parameters
        names = model.linears if lora.targets == "all-linear" else lora.targets
        return model.layers * lora.rank * sum(sum(model.linears[name]) for name in names)


def plan(recipe: Recipe, gpu: Gpu, mean_tokens: float | None = None) -> Plan:
    """Raises RecipeError for a model whose shape is not known, RunError for a batch that cannot be cut."""
    made = Plan(recipe, gpu, mean_tokens or c("mean_share") * recipe.grpo.sampling.max_new_tokens)
    shape(recipe.model.name)
    accumulation(recipe, made.training_gpus)
    return made


def training_memory(p: Plan) -> list[Line]:
    """GiB of a GPU that trains, while it trains."""
    r, n, w, model, zero = p.recipe, p.training_gpus, p.dtype_bytes, p.model, p.recipe.distributed.zero
    size, trained, lora = model.parameters, p.trained, bool(p.recipe.grpo.lora.rank)
    parts = {at: (n if zero >= at else 1) for at in (2, 3)}
    state, how = (12, "float32 weights, two moments") if zero and w == 2 else (2 * w, "two moments in the weights' dtype")
    state, how = (12, "float32 adapter: its gradients are float32 too") if lora else (state, how)
    offload = r.distributed.offload
    micro, s = r.grpo.micro_batch_completions, p.longest
    kept, checkpointing = model.kept_per_token * w, r.grpo.gradient_checkpointing
    activations = micro * s * ((model.layers * model.hidden * w + kept) if checkpointing else model.layers * kept)
    lines = [
        ("weights", 0 if offload == "all" else size * w / parts[3], f"{size / 1e9:.2f}e9 x {w} B / {parts[3]}"),
        ("gradients", trained * (4 if lora else w) / parts[2], f"{trained / 1e9:.3g}e9 x {4 if lora else w} B / {parts[2]}"),
        ("optimiser", 0 if offload != "none" else trained * state / parts[2],
         "in the host's memory" if offload != "none" else f"{trained / 1e9:.3g}e9 x {state} B / {parts[2]} ({how})"),
        ("activations", activations, f"{micro} x {s} tokens x " + (
            f"({model.layers} layers x {model.hidden} x {w} B + one layer's {kept / 1e3:.0f} kB)" if checkpointing else
            f"{model.layers} layers x {kept / 1e3:.0f} kB")),
        ("logits", c("logits_gib") * GIB, C["logits_gib"].source)]
    judge = shape(r.writing_rm.model) if r.reward.weights.writing and not r.reward.writing.url else None
    if zero == 3:
        layer = max(each.layer_parameters for each in (model, judge) if each)
        lines.append(("gathered layers", 2 * layer * w, f"2 x {layer / 1e6:.0f}e6 x {w} B"))
    if r.grpo.kl_beta and not lora:
        lines.append(("reference model", size * w / parts[3], f"kl_beta > 0: {size / 1e9:.2f}e9 x {w} B / {parts[3]}"))
    if judge:
        lines.append(("Writing RM", judge.parameters * w / parts[3],
                      f"reward.writing.url is empty: {judge.parameters / 1e9:.2f}e9 x {w} B / {parts[3]}"))
    return [Line("a GPU that trains", name, value / GIB, "GiB", how) for name, value, how in lines]


def writing_memory(p: Plan) -> list[Line]:
    """GiB of a GPU while completions are written: vLLM's share, or the whole model and the KV cache beside the trainer's."""
    vllm, w, model = p.recipe.vllm, p.dtype_bytes, p.model
    staying = [dataclasses.replace(line, group="a GPU that writes") for line in training_memory(p)
               if line.name in ("weights", "optimiser", "reference model", "Writing RM")]
    if vllm.mode == "none":
        held = p.completions / p.training_gpus
        whole = model.parameters * w if p.recipe.distributed.zero == 3 else 0
        return [*staying, Line("a GPU that writes", "whole model", whole / GIB, "GiB", "ZeRO-3 gathers it to generate"),
                Line("a GPU that writes", "KV cache", held * model.kv_bytes(p.longest, w) / GIB, "GiB",
                     f"{held:.0f} x {p.longest} tokens x {model.kv_bytes(dtype_bytes=w) / 1024:.0f} KiB")]
    share = vllm.memory_share * p.gpu.gib
    weights = model.parameters * w / vllm.tensor_parallel / GIB
    lines = [Line("a GPU that writes", "vLLM weights", weights, "GiB",
                  f"{model.parameters / 1e9:.2f}e9 x {w} B / {vllm.tensor_parallel}"),
             Line("a GPU that writes", "vLLM KV cache", share - weights, "GiB",
                  f"{vllm.memory_share} x {p.gpu.gib:.0f} - weights")]
    return lines if vllm.mode == "server" else [*staying, *lines]


def slots(p: Plan) -> int:
    """Completions of mean length that a copy of the model holds at once."""
    if p.recipe.vllm.mode == "none":
        return max(1, -(-p.completions // p.training_gpus))
    cache = next(line.value for line in writing_memory(p) if line.name == "vLLM KV cache") * GIB
    each = p.model.kv_bytes(c("prompt_tokens") + p.mean_tokens, p.dtype_bytes) / p.recipe.vllm.tensor_parallel
    return int(cache // each)


def problems(p: Plan) -> list[str]:
    """Why the recipe cannot run on these GPUs; empty if it can, as far as arithmetic tells."""
    found, room = [], p.gpu.gib - c("reserve_gib")
    training, writing = training_memory(p), writing_memory(p)
    together = p.recipe.vllm.mode == "colocate" and not p.recipe.vllm.sleep
    vllm = sum(line.value for line in writing if line.name.startswith("vLLM"))
    for lines, more in ((training, vllm if together else 0), (writing, 0)):
        if (need := sum(line.value for line in lines) + more) > room:
            largest = max(lines, key=lambda line: line.value)
            found.append(f"{lines[0].group} needs {need:.1f} GiB and has {room:.1f} ({p.gpu.gib:.0f} less "
                         f"{c('reserve_gib'):.0f} reserved); the largest part is {largest.name}, {largest.value:.1f} GiB: "
                         f"{largest.how}")
    if p.recipe.vllm.mode != "none" and slots(p) < 1:
        found.append(f"vLLM's KV cache does not hold one completion; raise vllm.tensor_parallel = "
                     f"{p.recipe.vllm.tensor_parallel} or vllm.memory_share = {p.recipe.vllm.memory_share}")
    return found


def c(name: str) -> float:
    """A constant's value."""
    return C[name].value


@contextlib.contextmanager
def assuming(**values: float):
    """What if a constant had another value?"""
    before = dict(C)
    C.update({name: dataclasses.replace(C[name], value=value) for name, value in values.items()})
    try:
        yield
    finally:
        C.update(before)


def shape(name: str) -> Shape:
    """Of a model in the table, or in a folder. Raises RecipeError for a hub model that is not known here."""
    if name in SHAPES:
        return SHAPES[name]
    folder = Path(models.resolve(name))
    if not (folder / "config.json").is_file():
        raise RecipeError(f"the shape of {name!r} is not known: give a folder with its config.json; known are "
                          f"{', '.join(SHAPES)}")
    found = json.loads((folder / "config.json").read_text())
    return Shape(found["num_hidden_layers"], found["hidden_size"], found["num_attention_heads"], found["num_key_value_heads"],
                 found["intermediate_size"], found["vocab_size"], found.get("tie_word_embeddings", False),
                 found.get("attention_bias", found.get("model_type") == "qwen2"))
