"""Shapes of decoders of the Llama and Qwen2 family: parameters, bytes that are kept, operations. No torch is imported."""

from pathlib import Path
from typing import NamedTuple

from lwzlib.base import models
from lwzlib.base.paths import TEXTS
from lwzlib.base.quantities import Lora
from lwzlib.base.recipe import RecipeError
from lwzlib.base.rows import read_json, read_yaml


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
    def matrices(self) -> int:
        """Parameters of the matrices of all layers, and of the output matrix: what autocast makes copies of."""
        return self.layers * sum(a * b for a, b in self.linears.values()) + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of all layers, the last norm, the embedding, and the output matrix unless it is tied."""
        return self.layers * self.layer_parameters + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def kv_bytes(self, tokens: float = 1, dtype_bytes: int = 2) -> float:
        """Bytes of the keys and values of all layers."""
        return 2 * self.layers * self.kv_width * dtype_bytes * tokens

    def trained(self, lora: Lora | None) -> int:
        """Parameters that have gradients: all, or those of an adapter. Raises RecipeError for a matrix outside the layers."""
        if not (lora and lora.rank):
            return self.parameters
        names = self.linears if lora.targets == "all-linear" else lora.targets
        if unknown := set(names) - set(self.linears):
            raise RecipeError(f"the size of an adapter of {', '.join(sorted(unknown))} is not known")
        return self.layers * lora.rank * sum(sum(self.linears[name]) for name in names)

    def kept_bytes(self, dtype_bytes: int = 2, autocast: bool = False) -> int:
        """Bytes per token that a layer keeps for its backward pass with a fused attention kernel: inputs of two norms and their
        float32 copies, of the matrices, the attention's q, k, v and output, and of the gated activation. Under autocast what
        goes from layer to layer is float32, and each matrix has a bfloat16 copy of its input to itself."""
        return dtype_bytes * ((15 if autocast else 10) * self.hidden + 2 * self.kv_width + 4 * self.inner)

    def flops(self, tokens: float, context: float, passes: int) -> float:
        """Operations of `passes` forward passes (a backward pass is two): 2 per weight and token; per layer 4 for each number
        of a hidden state and each of the `context` tokens that a token sees on average, with their keys and values."""
        matrices = self.parameters - self.vocab * self.hidden * (0 if self.tied else 1)
        return passes * tokens * (2 * matrices + 4 * self.layers * self.hidden * context)


SHAPES = {name: Shape(*numbers) for name, numbers in read_yaml(TEXTS / "hardware.yaml")["shapes"].items()}


def shape_of(name: str) -> Shape:
    """Shape of a model in the table, or in a folder. Raises RecipeError for a hub model that is not in the table."""
    if name in SHAPES:
        return SHAPES[name]
    file = Path(models.resolve(name)) / "config.json"
    if not file.is_file():
        raise RecipeError(f"the shape of {name!r} is not known: give a folder with its config.json; known are "
                          f"{', '.join(SHAPES)}")
    config = read_json(file)
    try:
        sizes = [config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
                                         "intermediate_size", "vocab_size")]
    except KeyError as error:
        raise RecipeError(f"{file} is of another family: it has no {error}") from None
    sizes += [config.get("tie_word_embeddings", False), config.get("attention_bias", config.get("model_type") == "qwen2")]
    return Shape(*sizes)
