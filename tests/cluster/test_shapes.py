"""Shapes of models against published numbers, loaded models, and what torch keeps."""

import json

import pytest

from lwzlib.base.kit import TINY
from lwzlib.base.models import load_model
from lwzlib.cluster.estimate import GIB
from lwzlib.cluster.plan_pages import planned
from lwzlib.cluster.shapes import SHAPES, Shape, shape_of


# Model cards of Qwen2.5 on the hub: billions of parameters, all and without embeddings.
@pytest.mark.parametrize(("name", "every", "inner"), [
    ("0.5B", 0.49, 0.36), ("1.5B", 1.54, 1.31), ("3B", 3.09, 2.77), ("7B", 7.61, 6.53), ("14B", 14.7, 13.1),
    ("32B", 32.5, 31.0), ("72B", 72.7, 70.0)])
def test_shapes_have_the_published_number_of_parameters(name, every, inner):
    found = SHAPES[f"Qwen/Qwen2.5-{name}"]
    assert found.parameters / 1e9 == pytest.approx(every, rel=0.01)
    embeddings = found.vocab * found.hidden * (1 if found.tied else 2)
    assert (found.parameters - embeddings) / 1e9 == pytest.approx(inner, rel=0.02)


def test_a_folders_shape_and_adapter_have_the_parameters_of_the_loaded_model(smoke):
    from peft import LoraConfig, get_peft_model

    model, _ = load_model(TINY, "float32", "sdpa")
    assert shape_of(TINY).parameters == model.num_parameters()
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        asked = f"grpo.lora={{rank: 3, alpha: 8, targets: {json.dumps(targets)}}}"
        p = planned("smoke", ["grpo.lora.rank=3", f"grpo.lora.targets={json.dumps(targets)}"])
        adapted = get_peft_model(load_model(TINY, "float32", "sdpa")[0], LoraConfig(r=3, target_modules=targets))
        assert p.trained == adapted.get_nb_trainable_parameters()[0], asked


def test_a_token_of_the_kv_cache_is_that_of_the_vllm_paper():
    opt_13b = Shape(40, 5120, 40, 40, 20480, 50272, True)  # arXiv 2309.06180, section 3: 800 KB
    assert opt_13b.kv_bytes() / 1024 == 800


# GPU memory of loaded models, GiB: Qwen2.5's documentation, transformers, input of 1 token; the weights are most of it.
@pytest.mark.parametrize(("name", "gib"), [("14B", 28.08), ("32B", 61.58), ("72B", 136.20)])
def test_weights_fill_what_loaded_models_were_seen_to_fill(name, gib):
    weights = SHAPES[f"Qwen/Qwen2.5-{name}"].parameters * 2 / GIB
    assert 0.93 * gib < weights < gib


def test_training_arithmetic_is_that_of_llama_3():
    llama = Shape(126, 16384, 128, 8, 53248, 128256, False, False)  # arXiv 2407.21783: 405B, 15.6e12 tokens, 3.8e25 FLOPs
    assert llama.parameters / 1e9 == pytest.approx(405, rel=0.01)
    assert llama.flops(15.6e12, 4096, 3) == pytest.approx(3.8e25, rel=0.05)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_layer_keeps_is_near_what_torch_keeps(smoke, autocast):
    """Measured: bytes that autograd saves in a layer of this family with fused attention, in bfloat16 or in float32 weights
    under autocast: of the weights nothing, or a copy of each matrix."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, attn_implementation="sdpa")
    model, tokens, kept = LlamaForCausalLM(config), 500, {}
    model = model if autocast else model.bfloat16()
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tokens in tensor.shape
        return tensor

    held = []
    with (torch.autocast("cpu", torch.bfloat16, enabled=autocast),
          torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or pack(t), lambda t: t)):
        model.model(torch.ones(1, tokens, dtype=torch.long))
    shape = Shape(4, 256, 4, 2, 704, 0, True, False)
    measured = sum(size for size, of_tokens in kept.values() if of_tokens) / config.num_hidden_layers / tokens
    assert shape.kept_bytes(2, autocast) == pytest.approx(measured, rel=0.06)
    copies = sum(size for size, of_tokens in kept.values() if not of_tokens)
    assert copies == pytest.approx(2 * shape.matrices if autocast else 0, abs=20_000)
