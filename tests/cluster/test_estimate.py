"""Estimates against published and measured points, and against a simulation token by token."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwzlib.base.kit import TINY
from lwzlib.base.models import load_model
from lwzlib.base.recipe import RecipeError
from lwzlib.base.rows import RunError
from lwzlib.cluster.estimate import GIB, GPUS, SHAPES, Shape, assuming, constant, problems, shape_of, training_memory
from lwzlib.cluster.plan_pages import pages, planned
from lwzlib.cluster.step_time import decode_s, lengths, replica_s, simulate_step

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_model_without_a_known_shape_is_refused():
    with pytest.raises(RecipeError, match=r"shape of 'someone/model' is not known.*Qwen/Qwen2\.5-7B"):
        planned("paper", ["model.name=someone/model"])


# ZeRO, arXiv 1910.02054, Figure 1: 7.5e9 parameters, 64 GPUs, K = 12.
@pytest.mark.parametrize(("zero", "gigabytes"), [(2, 16.6), (3, 1.9)])
def test_model_states_are_those_of_the_zero_paper(monkeypatch, zero, gigabytes):
    monkeypatch.setattr(Shape, "parameters", 7_500_000_000)
    p = planned("paper", [f"distributed.zero={zero}", "vllm.mode=none", "vllm.nodes=0"])
    states = [line.value for line in training_memory(p) if line.name in ("weights", "gradients", "optimiser")]
    assert sum(states) * GIB / 1e9 == pytest.approx(gigabytes, rel=0.015)


def test_a_token_of_the_kv_cache_is_that_of_the_vllm_paper():
    opt_13b = Shape(40, 5120, 40, 40, 20480, 50272, True)  # arXiv 2309.06180, section 3: 800 KB
    assert opt_13b.kv_bytes() / 1024 == 800


# GPU memory of loaded models, GiB: Qwen2.5's documentation, transformers, input of 1 token; the weights are most of it.
@pytest.mark.parametrize(("name", "gib"), [("14B", 28.08), ("32B", 61.58), ("72B", 136.20)])
def test_weights_fill_what_loaded_models_were_seen_to_fill(name, gib):
    weights = SHAPES[f"Qwen/Qwen2.5-{name}"].parameters * 2 / GIB
    assert 0.93 * gib < weights < gib


# Tokens a second of vLLM 0.6.3 on A100, batch 1, 2,048 tokens after so many: Qwen2.5's documentation, speed benchmark.
@pytest.mark.parametrize(("name", "before", "gpus", "speed"), [
    ("0.5B", 1, 1, 311.55), ("0.5B", 14336, 1, 290.28), ("1.5B", 1, 1, 183.33), ("14B", 1, 1, 46.30), ("14B", 14336, 1, 41.91),
    ("14B", 30720, 1, 37.18), ("32B", 1, 1, 22.13), ("32B", 14336, 1, 19.91), ("32B", 30720, 2, 31.82)])
def test_decoding_is_as_fast_as_published(name, before, gpus, speed):
    p = planned("paper", [f"model.name=Qwen/Qwen2.5-{name}", f"vllm.tensor_parallel={gpus}"], gpu="a100")
    assert 1 / decode_s(p, 1, before + 1024) == pytest.approx(speed, rel=0.2)


def test_training_arithmetic_is_that_of_llama_3():
    llama = Shape(126, 16384, 128, 8, 53248, 128256, False, False)  # arXiv 2407.21783: 405B, 15.6e12 tokens, 3.8e25 FLOPs
    assert llama.parameters / 1e9 == pytest.approx(405, rel=0.01)
    assert llama.flops(15.6e12, 4096, 3) == pytest.approx(3.8e25, rel=0.05)


@pytest.mark.parametrize(("layers", "hidden", "heads", "kv", "inner", "hours"), [
    (32, 4096, 32, 32, 11008, 184_320), (80, 8192, 64, 8, 28672, 1_720_320)])
def test_training_time_is_near_that_of_llama_2(layers, hidden, heads, kv, inner, hours):
    """arXiv 2307.09288, Table 2: GPU-hours on A100 for 2e12 tokens. The share of peak assumed here is on the slow side."""
    llama = Shape(layers, hidden, heads, kv, inner, 32000, False, False)
    found = llama.flops(2e12, 2048, 3) / (GPUS["a100"].flops * constant("train_flops_share")) / 3600
    assert hours < found < 1.3 * hours


def test_what_a_layer_keeps_is_near_what_torch_keeps(smoke):
    """Measured: bytes that autograd saves in a layer of this family with fused attention, weights left out."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, attn_implementation="sdpa")
    model, tokens, kept = LlamaForCausalLM(config).bfloat16(), 512, {}
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or pack(t), lambda t: t):
        model.model(torch.ones(1, tokens, dtype=torch.long))
    shape = Shape(4, 256, 4, 2, 704, 64, True, False)
    measured = sum(kept.values()) / config.num_hidden_layers / tokens
    assert shape.kept_per_token * 2 == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(("sets", "where", "reason"), [
    (["distributed.zero=2"], {}, "reward.writing.url is empty: 72.71e9 x 2 B / 1$"),
    (["vllm.mode=none", "vllm.nodes=0"], {}, "a GPU that writes needs .* whole model"),
    ([], {"nodes": 1, "gpus": 8}, "a GPU that trains needs .* optimiser"),
    ([], {"gpu_gib": 24}, "a GPU that trains needs")])
def test_a_recipe_that_cannot_fit_is_refused_with_the_reason(sets, where, reason):
    assert re.search(reason, "; ".join(problems(planned("paper", sets, **where))))


def test_the_command_shows_the_arithmetic_and_refuses():
    command = [sys.executable, "-m", "lwzlib.cli.main", "estimate", "paper"]
    fits = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""})
    assert fits.returncode == 0, fits.stderr
    for shown in ("32.76e9 x 2 B / 32", "64 layers x 5120 x 2 B", "65.5 GB / 10 GB/s", "GPU-hours", "assumed", "published"):
        assert shown in fits.stdout
    refused = subprocess.run([*command, "-s", "distributed.zero=2"], capture_output=True, text=True)
    assert refused.returncode == 1 and "lwz: recipe paper cannot run on 64 x H800" in refused.stderr


@pytest.mark.parametrize(("where", "message"), [({"gpu": "h8000"}, "no GPU 'h8000'"), ({"gpus": 7}, "tensor_parallel")])
def test_gpus_that_cannot_be_are_refused(where, message):
    with pytest.raises(RecipeError, match=message):
        planned("paper", **where)


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(RunError, match=r"1024 completions a step cannot be cut .* on 48 processes"):
        planned("paper", ["vllm.nodes=2"])


def token_by_token(p, tokens, places):
    """The same replica, one decoding step after the other."""
    queue, running, seconds = list(tokens[places:]), [[int(t), 0] for t in tokens[:places]], 0.0
    while running:
        seconds += decode_s(p, len(running), constant("prompt_tokens") + np.mean([at for _, at in running]) + 0.5)
        running = [[left - 1, at + 1] for left, at in running if left > 1]
        while queue and len(running) < places:
            running.append([int(queue.pop()), 0])
    return seconds


PAPER = planned("paper")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 12))
def test_a_replica_takes_as_long_as_token_by_token(tokens, places):
    seconds, tail = replica_s(PAPER, np.array(tokens, float), places)
    assert seconds == pytest.approx(token_by_token(PAPER, tokens, places), rel=1e-3)
    assert 0 <= tail < seconds
    assert seconds >= max(tokens) * decode_s(PAPER, 1, constant("prompt_tokens"))


@settings(max_examples=30, deadline=None)
@given(st.integers(500, 13_000))
def test_lengths_have_the_mean_that_was_asked_for_and_end_at_the_maximum(mean):
    p = planned("paper", mean_tokens=mean)
    found = lengths(p)
    assert len(found) == 1024 and found.min() >= 1 and found.max() <= 14_000
    assert found.mean() == pytest.approx(mean, rel=0.02)


def test_a_step_grows_with_the_completions_and_waits_no_longer_than_it_trains():
    short, long = (simulate_step(planned("paper", mean_tokens=mean)) for mean in (3000, 9000))
    assert short.seconds < long.seconds
    for each in (short, long):
        parts = {line.name: line.value for line in each.lines}
        assert each.seconds == pytest.approx(sum(parts.values())) and each.bound.value == max(parts.values())
        assert 0 < each.tail_s < parts["writing"] and 0 < each.waiting_s < parts["training"] + parts["log-probabilities"]


def test_what_if_lasts_as_long_as_its_block():
    before = constant("rm_gpus")
    with pytest.raises(KeyError), assuming(rm_gpus=16):
        assert constant("rm_gpus") == 16
        raise KeyError
    assert constant("rm_gpus") == before


@pytest.mark.parametrize("file", pages())
def test_committed_pages_are_what_the_command_makes(file):
    assert (ROOT / "cluster_jobs" / file).read_text() == pages()[file], "run `python -m lwzlib.cluster.plan_pages`"


def test_estimates_need_no_torch():
    code = ("import sys\nfrom lwzlib.cli import main\n"
            "from lwzlib.cluster import plan_pages\nplan_pages.pages()\nassert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
