"""Estimates against published and measured points, and against a simulation token by token."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwzlib.base.kit import TINY
from lwzlib.base.recipe import RecipeError
from lwzlib.base.rows import RunError
from lwzlib.cluster.disk import disk
from lwzlib.cluster.estimate import GIB, GPUS, assuming, constant, problems, training_memory, writing_memory
from lwzlib.cluster.plan_pages import pages, planned, readings, room_for_queries
from lwzlib.cluster.shapes import SHAPES, Shape
from lwzlib.cluster.step_time import decode_s, lengths, replica_s, simulate_step, training_s

ROOT = Path(__file__).resolve().parents[2]
PAPER = planned("paper")


def test_a_model_without_a_known_shape_is_refused():
    with pytest.raises(RecipeError, match=r"shape of 'someone/model' is not known.*Qwen/Qwen2\.5-7B"):
        planned("paper", ["model.name=someone/model"])


def parts(plan, stage="grpo"):
    return {line.name: line.value * GIB for line in training_memory(plan, stage)}


# ZeRO, arXiv 1910.02054, Figure 1: 7.5e9 parameters, 64 GPUs, K = 12; its gradients have 2 bytes, and those here 4.
@pytest.mark.parametrize(("zero", "gigabytes"), [(2, 16.6), (3, 1.9)])
def test_model_states_are_those_of_the_zero_paper(monkeypatch, zero, gigabytes):
    monkeypatch.setattr(Shape, "parameters", 7_500_000_000)
    p = planned("paper", [f"distributed.zero={zero}", "vllm.mode=none", "vllm.nodes=0"])
    of_the_paper = parts(p)["weights"] + parts(p)["gradients"] / 2 + parts(p)["optimiser"]
    assert of_the_paper / 1e9 == pytest.approx(gigabytes, rel=0.015)


def test_memory_of_weights_without_zero_is_that_of_the_trained_model(smoke, monkeypatch):
    """All weights are float32 and have gradients and two moments as long as they are, whatever the recipe's dtype."""
    import torch

    from lwzlib.base import fast_cpu, trainers

    monkeypatch.setattr(fast_cpu, "computed_in", lambda dtype: dtype)
    p = planned("gpu", {"model.name": TINY, "model.attention": "sdpa", "vllm.mode": "none"})
    model, _ = trainers.load_trainee(p.recipe, TINY)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimiser.step()
    moments = [value for state in optimiser.state.values() for value in state.values() if value.dim()]
    expected = {"weights": model.parameters(), "gradients": [w.grad for w in model.parameters()], "optimiser": moments}
    for name, tensors in expected.items():
        assert parts(p)[name] == pytest.approx(sum(tensor.nbytes for tensor in tensors)), name
    adapter = planned("gpu", {"model.name": TINY, "vllm.mode": "none", "grpo.lora.rank": 4})
    assert parts(adapter)["weights"] == pytest.approx(parts(p)["weights"] / 2) and "autocast copies" not in parts(adapter)


def test_vllm_and_saved_models_keep_the_recipes_dtype():
    written = {line.name: line.value * GIB for line in writing_memory(planned("gpu"))}
    assert written["vLLM weights"] * 2 == pytest.approx(written["weights"])
    models = next(line for line in disk(planned("gpu")) if line.name == "models")
    assert models.how.endswith("x 2 B")


STAGES = ("writing-rm", "pretrain", "grpo", "sft")


def test_every_stage_that_trains_is_estimated(tmp_path):
    assert tuple(planned("paper").stages) == STAGES and tuple(planned("gpu").stages) == ("cold-start", *STAGES)
    (tmp_path / "one.yaml").write_text("extends: paper\narms: {base-think: {start: base, prompt: think}}")
    only = planned(str(tmp_path / "one.yaml"), "reward.weights.writing=0.0")
    assert tuple(only.stages) == ("grpo",)
    given = planned("paper", ["reward.writing.model=runs/judge"])
    assert "writing-rm" not in given.stages and "Writing RM" in parts(given)


@pytest.mark.parametrize(("stage", "larger", "smaller"), [
    ("writing-rm", "writing_rm.batch_pairs=2", "writing_rm.max_tokens=12000"),
    ("pretrain", "pretrain.sequence_tokens=131072", "pretrain.sequence_tokens=16384"),
    ("sft", "sft.batch_sequences=4", "sft.max_tokens=16384"),
    ("grpo", "grpo.micro_batch_completions=8", "grpo.sampling.max_new_tokens=7000")])
def test_the_stage_that_does_not_fit_is_named(stage, larger, smaller):
    before, p = parts(planned("paper"), stage)["activations"], planned("paper", larger)
    assert parts(planned("paper", smaller), stage)["activations"] < before < parts(p, stage)["activations"]
    [reason] = problems(p)
    assert reason.startswith(f"{stage}: a GPU that trains needs ") and "the largest part is activations" in reason
    assert not problems(p, *set(STAGES) - {stage})


def test_a_cold_start_is_one_process_that_shards_nothing():
    p = planned("paper", "cold_start.queries=64")
    assert parts(p, "cold-start")["weights"] == 4 * SHAPES["Qwen/Qwen2.5-32B"].parameters
    assert [reason.partition(":")[0] for reason in problems(p)] == ["cold-start"]


# Tokens a second of vLLM 0.6.3 on A100, batch 1, 2,048 tokens after so many: Qwen2.5's documentation, speed benchmark.
@pytest.mark.parametrize(("name", "before", "gpus", "speed"), [
    ("0.5B", 1, 1, 311.55), ("0.5B", 14336, 1, 290.28), ("1.5B", 1, 1, 183.33), ("14B", 1, 1, 46.30), ("14B", 14336, 1, 41.91),
    ("14B", 30720, 1, 37.18), ("32B", 1, 1, 22.13), ("32B", 14336, 1, 19.91), ("32B", 30720, 2, 31.82)])
def test_decoding_is_as_fast_as_published(name, before, gpus, speed):
    p = planned("paper", [f"model.name=Qwen/Qwen2.5-{name}", f"vllm.tensor_parallel={gpus}"], gpu="a100")
    assert 1 / decode_s(p, 1, before + 1024) == pytest.approx(speed, rel=0.2)


@pytest.mark.parametrize(("layers", "hidden", "heads", "kv", "inner", "hours"), [
    (32, 4096, 32, 32, 11008, 184_320), (80, 8192, 64, 8, 28672, 1_720_320)])
def test_training_time_is_near_that_of_llama_2(layers, hidden, heads, kv, inner, hours):
    """arXiv 2307.09288, Table 2: GPU-hours on A100 for 2e12 tokens. The share of peak assumed here is on the slow side."""
    llama = Shape(layers, hidden, heads, kv, inner, 32000, False, False)
    found = llama.flops(2e12, 2048, 3) / (GPUS["a100"].flops * constant("train_flops_share")) / 3600
    assert hours < found < 1.3 * hours


def test_checkpointed_layers_keep_the_float32_that_goes_between_them():
    """Measured by the test above: under autocast the residual is float32."""
    activations = next(line.how for line in training_memory(planned("gpu")) if line.name == "activations")
    assert "24 layers x 896 x 4 B" in activations
    assert "64 layers x 5120 x 2 B" in next(line.how for line in training_memory(PAPER) if line.name == "activations")


def test_micro_batches_in_order_of_length_wait_less():
    tokens = lengths(PAPER)
    seconds, waiting = training_s(PAPER, tokens, 4)
    ordered, rest = training_s(PAPER, tokens, 4, by_length=True)
    assert 0 <= rest < waiting / 3 and ordered - rest == pytest.approx(seconds - waiting)


def test_both_readings_of_32_are_shown():
    a_query, a_step = readings(PAPER)
    assert (a_query["completions a step"], a_step["completions a step"]) == (1024, 32)
    page = (ROOT / "docs" / "departures.md").read_text()
    assert f"`grpo.group_size={a_step['group_size']} grpo.queries_per_step={a_step['queries_per_step']}`" in page
    assert float(a_query["s a step"]) == pytest.approx(simulate_step(PAPER).seconds, abs=1) and float(a_step["s a step"]) < 300
    _, refused = readings(planned("paper", ["vllm.mode=colocate", "vllm.nodes=0"]))
    assert "32 completions a step cannot be cut" in refused["s a step"]


def test_the_room_for_a_query_beside_the_longest_answer_is_shown():
    training, samples = room_for_queries(PAPER)
    assert "leaves 2000 tokens for a query beside grpo.sampling.max_new_tokens = 14000" in training and "cut" not in training
    assert "leaves 500 tokens" in samples and samples.endswith("so the longest answers are cut for it")
    assert not room_for_queries(planned("paper", "reward.weights.writing=0.0"))


@pytest.mark.parametrize(("sets", "where", "reason"), [
    (["distributed.zero=2"], {}, "reward.writing.url is empty: 72.71e9 x 2 B / 1;"),
    (["vllm.mode=none", "vllm.nodes=0"], {}, "a GPU that writes needs .* whole model"),
    ([], {"nodes": 1, "gpus": 8}, "a GPU that trains needs .* optimiser"),
    ([], {"gpu_gib": 24}, "a GPU that trains needs")])
def test_a_recipe_that_cannot_fit_is_refused_with_the_reason(sets, where, reason):
    assert re.search(reason, "; ".join(problems(planned("paper", sets, **where))))


def test_the_command_shows_the_arithmetic_and_refuses():
    command = [sys.executable, "-m", "lwzlib.cli.main", "estimate", "paper"]
    fits = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""})
    assert fits.returncode == 0, fits.stderr
    for shown in ("32.76e9 x 2 B / 32", "64 layers x 5120 x 2 B", "65.5 GB / 10 GB/s", "GPU-hours", "assumed", "published",
                  "writing-rm: a GPU that trains", "checkpoints of 458.7 GB", "32 trajectories a step", "leaves 500 tokens"):
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
