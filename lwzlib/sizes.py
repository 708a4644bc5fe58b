"""Sizes and speeds that estimates rest on: models' shapes, GPUs, and constants that say where they come from.

The paper names models and GPUs and no cost. A constant is published, measured by this kit, or assumed by it; `lwz estimate`
shows which. No torch is imported.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

from lwzlib import models
from lwzlib.recipe import RecipeError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number that estimates rest on, and where it comes from."""

    value: float
    unit: str
    kind: str  # published, measured or assumed
    source: str


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


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What estimates ask of a GPU; `gib` is its memory."""

    name: str
    gib: float
    flops: float  # dense bfloat16, a second
    bandwidth: float  # bytes a second


GPUS = {  # NVIDIA's data sheets
    "h800": Gpu("H800", 80, 989e12, 3.35e12), "h100": Gpu("H100", 80, 989e12, 3.35e12),
    "a100": Gpu("A100", 80, 312e12, 2.039e12), "h200": Gpu("H200", 141 * 1e9 / GIB, 989e12, 4.8e12)}


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


SHAPES = {  # config.json of each model on the hub
    "Qwen/Qwen2.5-0.5B": Shape(24, 896, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": Shape(28, 1536, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B": Shape(36, 2048, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": Shape(28, 3584, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B": Shape(48, 5120, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B": Shape(64, 5120, 40, 8, 27648, 152064, False),
    "Qwen/Qwen2.5-72B": Shape(80, 8192, 64, 8, 29568, 152064, False),
}


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
