"""Decoding that is faster and the same: logits, tokens, distribution, and nothing left behind."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats

from lwzlib.base import fast_cpu, models
from lwzlib.base.kit import MINILM, SMOLLM2, TINY
from lwzlib.base.models import load_model
from lwzlib.base.provenance import hardware

GREEDY = {"do_sample": False, "max_new_tokens": 12}
DRAWN = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
can_pack = pytest.mark.skipif(not fast_cpu._has_bfloat16(), reason="this CPU has no bfloat16 product")


def loaded(dtype="bfloat16", name=TINY):
    return load_model(name, dtype, "eager")


def tokenised(tokenizer, *texts):
    return tokenizer(list(texts or ("rain on the roof", "a")), return_tensors="pt", padding=True)


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_without_a_bfloat16_product_computes_in_float32_and_says_so(has, expected, monkeypatch):
    monkeypatch.setattr(fast_cpu, "_has_bfloat16", lambda: has)
    models._load_encoder.cache_clear()
    assert str(loaded()[0].dtype) == str(models._load_encoder(MINILM).dtype) == f"torch.{expected}"
    assert str(loaded("float32")[0].dtype) == "torch.float32"
    assert ("computed in float32" in hardware()) is not has
    models._load_encoder.cache_clear()


@can_pack
@pytest.mark.parametrize("name", [TINY, SMOLLM2])
def test_logits_and_greedy_tokens_are_the_same_bits(name):
    model, tokenizer = loaded(name=name)
    texts = tokenised(tokenizer)
    assert torch.equal(type(model).generate(model, **texts, **GREEDY), model.generate(**texts, **GREEDY))
    for policy in (model, get_peft_model(model, ADAPTER)):
        with torch.no_grad():
            before = policy(**texts).logits
            with fast_cpu.faster(policy):
                layers = [layer for layer in policy.modules() if "forward" in layer.__dict__]
                assert len(layers) > 14 and torch.equal(before, policy(**texts).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_loaded_model_and_an_adapter_on_it_generate_within_the_block(dtype, monkeypatch):
    model, tokenizer = loaded(dtype)
    entered = []
    monkeypatch.setattr(fast_cpu, "_packed", lambda model: entered.append(model) or {})
    model.generate(**tokenised(tokenizer), **DRAWN)
    get_peft_model(model, ADAPTER).generate(**tokenised(tokenizer), **DRAWN)
    assert entered == [model, model]


def test_one_draw_follows_the_probabilities_and_never_takes_what_has_none():
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 5.0, 0.0, 2.0, 2.0, 1.0, 0.0])
    drawn = fast_cpu._multinomial((weights / weights.sum()).expand(20_000, -1), num_samples=1)
    assert drawn.shape == (20_000, 1) and drawn.dtype == torch.int64
    counts = torch.bincount(drawn.flatten(), minlength=7)
    assert counts[weights == 0].sum() == 0
    assert stats.chisquare(counts[weights > 0], weights[weights > 0] / 10 * 20_000).pvalue > 0.001
    assert fast_cpu._multinomial(weights, 1).shape == (1,)  # as torch's own


def test_other_draws_are_torchs_own():
    weights = torch.rand(5, 9)
    for how in ({"num_samples": 3}, {"num_samples": 1, "replacement": True}, {"num_samples": 4, "replacement": True}):
        torch.manual_seed(3)
        expected = torch.multinomial(weights, **how)
        torch.manual_seed(3)
        assert torch.equal(fast_cpu._multinomial(weights, **how), expected)


def test_a_seed_draws_the_same_tokens_again():
    model, tokenizer = loaded()
    texts, drawn = tokenised(tokenizer), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(model.generate(**texts, **DRAWN).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    model, _ = loaded()
    original = torch.multinomial
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), fast_cpu.faster(model):
        assert torch.multinomial is not original
        if fails:
            raise KeyboardInterrupt
    assert torch.multinomial is original and not any("forward" in m.__dict__ for m in model.modules())


def test_weights_that_change_between_generations_are_seen():
    model, tokenizer = loaded()
    texts = tokenised(tokenizer)
    before = model.generate(**texts, **GREEDY)
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.normal_()  # as merging an adapter does, unseen by autograd
    after = model.generate(**texts, **GREEDY)
    fresh = type(model)(model.config).to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    assert not torch.equal(before, after) and torch.equal(after, fresh.eval().generate(**texts, **GREEDY))


@can_pack
def test_gradients_flow_inside_the_block():
    model, tokenizer = loaded()
    gradients = []
    for block in (nullcontext(), fast_cpu.faster(model)):
        model.zero_grad()
        with block:
            model(**tokenised(tokenizer)).logits.float().logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_float32_logits_are_the_same_but_for_the_order_of_summation():
    model, tokenizer = loaded("float32", SMOLLM2)
    texts = tokenised(tokenizer)
    for policy in (model, get_peft_model(model, ADAPTER)):
        with torch.no_grad():
            before = policy(**texts).logits
            with fast_cpu.faster(policy):
                layers = [layer for layer in policy.modules() if "forward" in layer.__dict__]
                after = policy(**texts).logits
        assert len(layers) > 14 and (before - after).abs().max() < 1e-4 * before.abs().max()


def test_layers_that_another_library_wraps_and_shards_are_left_alone():
    model, _ = loaded()
    wrapped, sharded = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    wrapped.forward = wrapped.forward
    sharded.weight.data = torch.empty(0, dtype=torch.bfloat16)
    with fast_cpu.faster(model):
        assert "forward" not in sharded.__dict__
    assert "forward" in wrapped.__dict__
