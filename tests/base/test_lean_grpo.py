"""The leaner trainer against TRL's own: the same values from fewer columns, one request a prompt, ends at stop strings."""

import random
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from trl import GRPOTrainer

from lwzlib.base.lean_grpo import (
    LeanGRPOTrainer,
    by_length,
    cut_at_stop,
    one_request_a_prompt,
    sampling_arguments,
    used_columns,
)
from lwzlib.base.recipe import load_recipe
from lwzlib.method import grpo
from lwzlib.pipeline.stages import run_stage, stage_run

ARM = "base-think"
COMMON = {"reward.weights.writing": 0.0, "cold_start.queries": 0, "grpo.sampling.max_new_tokens": 120}


@pytest.fixture
def trainer(smoke, tmp_path):
    made = load_recipe("smoke", COMMON)
    run = stage_run("grpo", made, tmp_path, 0, ARM)
    run.folder.mkdir(parents=True)
    return grpo.trainer(made, run, ARM, made.model.name)


def batch(prompts: list[int], completions: list[int]):
    """Ids and mask of prompts, padded on the left, and completions, padded on the right, of so many tokens."""
    wide, long = max(prompts), max(completions)
    mask = torch.tensor([[0] * (wide - p) + [1] * p + [1] * c + [0] * (long - c)
                         for p, c in zip(prompts, completions, strict=True)])
    ids = torch.randint(0, 250, mask.shape, generator=torch.manual_seed(0)) * mask
    return ids, mask, long


@pytest.mark.parametrize("size", [1, 2, 5, None])
def test_values_are_trls_and_columns_those_that_are_needed(trainer, monkeypatch, size):
    ids, mask, long = batch([5, 17, 9, 3, 8], [34, 210, 12, 1, 66])
    theirs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, long, size, compute_entropy=True)
    columns, forward = [], trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda **inputs: columns.append(inputs["input_ids"].shape[1])
                        or forward(**inputs))
    ours = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, long, size, compute_entropy=True)
    completion = mask[:, -long:].bool()
    for mine, their in zip(ours[:2], theirs[:2], strict=True):
        assert mine.shape == their.shape and torch.allclose(mine[completion], their[completion], atol=2e-6)
    assert ours[2] is theirs[2] is None
    assert columns == {1: [39, 227, 21, 4, 74], 2: [227, 21, 74], 5: [227], None: [227]}[size]


def test_a_step_of_sorted_and_trimmed_batches_has_trls_gradient(smoke, tmp_path, monkeypatch):
    """Four micro-batches of one completion: what TRL's own step makes of the weights, and how wide its forward passes are."""
    made = load_recipe("smoke", COMMON, {"grpo.micro_batch_completions": 1, "grpo.steps": 2})
    weights, widths = {}, {}
    for kind in (LeanGRPOTrainer, GRPOTrainer):
        with monkeypatch.context() as patch:
            seen = widths[kind] = []

            def spy(self, model, ids, *rest, seen=seen, inner=GRPOTrainer._get_per_token_logps_and_entropies, **more):
                seen.append(ids.shape[1])
                return inner(self, model, ids, *rest, **more)

            patch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
            if kind is GRPOTrainer:
                for name in ("_prepare_inputs", "_get_per_token_logps_and_entropies"):
                    patch.delattr(LeanGRPOTrainer, name)
            folder = run_stage("grpo", made, tmp_path / kind.__name__, 0, ARM)
        weights[kind] = load_file(folder / "model.safetensors")
    ours, theirs = weights.values()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 2e-6
    assert len(widths[LeanGRPOTrainer]) == len(widths[GRPOTrainer]) == 8
    assert len(set(widths[GRPOTrainer][:4])) == 1, "TRL gives each micro-batch the columns of the longest"
    assert sorted(widths[LeanGRPOTrainer][:4], reverse=True) == widths[LeanGRPOTrainer][:4]
    assert sum(widths[LeanGRPOTrainer]) < sum(widths[GRPOTrainer])


@pytest.mark.parametrize("knob", ["entropy_coef=0.5", "top_entropy_quantile=0.5"])
def test_what_depends_on_the_company_of_a_completion_is_trls_too(smoke, tmp_path, monkeypatch, knob):
    """TRL's entropy bonus is a mean over a micro-batch, its quantile one of a micro-batch: there nothing is sorted."""
    made, weights = load_recipe("smoke", COMMON, f"grpo.micro_batch_completions=2 grpo.steps=2 grpo.trl.{knob}"), []
    for trls in (False, True):
        with monkeypatch.context() as patch:
            if trls:
                patch.delattr(LeanGRPOTrainer, "_prepare_inputs")
            folder = run_stage("grpo", made, tmp_path / str(trls), 0, ARM)
        weights.append(load_file(folder / "model.safetensors"))
    ours, theirs = weights
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 2e-6


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_no_token_is_trimmed(rows):
    _, mask, long = batch([p for p, _ in rows], [c for _, c in rows]) if any(c for _, c in rows) else batch([1], [1])
    first, end = used_columns(mask, long)
    assert mask[:, first:end].sum() == mask.sum() and mask[:, first].any() and end > mask.shape[1] - long


@given(st.lists(st.lists(st.integers(1, 20), min_size=2, max_size=2), min_size=1, max_size=6))
def test_sorting_moves_whole_completions(lengths):
    batches = [{"completion_mask": torch.tensor([[1] * n + [0] * (20 - n) for n in pair]), "advantages": torch.tensor(pair),
                "num_items_in_batch": torch.tensor(7), "old_per_token_logps": None} for pair in lengths]
    ordered = by_length(batches)
    assert [len(part["advantages"]) for part in ordered] == [2] * len(lengths)
    found = torch.cat([part["advantages"] for part in ordered]).tolist()
    assert found == sorted((n for pair in lengths for n in pair), reverse=True)
    assert all((part["completion_mask"].sum(1) == part["advantages"]).all() for part in ordered)
    assert all(part["num_items_in_batch"] == 7 and part["old_per_token_logps"] is None for part in ordered)


def test_each_prompt_is_a_request_and_the_order_stays():
    asked, together = [], threading.Barrier(6)

    def generate(prompts, n, **sampling):
        together.wait(10)  # breaks if they are not asked at the same time
        time.sleep(random.random() / 50)
        asked.append((prompts, sampling))
        return {"prompt_ids": prompts, "completion_ids": [[*prompts[0], i] for i in range(n)], "logprobs": None}

    prompts = [[number] for number in range(6)]
    found = one_request_a_prompt(generate)(prompts=prompts, features=None, n=2, temperature=0.8)
    assert found == {"prompt_ids": prompts, "completion_ids": [[p, i] for p in range(6) for i in range(2)], "logprobs": None}
    assert sorted(asked) == [([prompt], {"temperature": 0.8}) for prompt in prompts]


@given(st.text("ab<", max_size=30), st.sampled_from([["ab"], ["<a", "bb"], []]))
def test_completions_are_cut_behind_their_first_stop_string(text, stop):
    ids = list(text.encode())
    cut = bytes(cut_at_stop(ids, stop, lambda part: bytes(part).decode())).decode()
    ends = [text.find(string) + len(string) for string in stop if string in text]
    assert cut == text[: min(ends, default=len(text))]


def test_grpo_ends_completions_at_stop_strings(smoke, tmp_path):
    """A random model soon writes one of three letters: there a completion ends, is whole, and no padding is trained on."""
    made = load_recipe("smoke", COMMON, {"grpo.stop": ["Q", "X", "Z"], "grpo.steps": 2})
    run_stage("grpo", made, tmp_path, 0, ARM)
    rows = stage_run("grpo", made, tmp_path, 0, ARM).rows("completions")
    stopped = [row for row in rows if set(row["completion"]) & set("QXZ")]
    assert len(stopped) > 2
    for row in stopped:
        *before, last = row["completion"]
        assert last in "QXZ" and not set(before) & set("QXZ") and not row["truncated"]
        assert row["completion_tokens"] < 120


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_what_was_cut_off_has_no_loss_and_what_a_stop_string_ended_keeps_it(smoke, tmp_path, loss):
    made = load_recipe("smoke", COMMON, {"grpo.stop": ["Q", "X", "Z"], "grpo.mask_truncated": True, "grpo.loss": loss,
                                         "grpo.sampling.max_new_tokens": 40, "grpo.group_size": 16,
                                         "grpo.micro_batch_completions": 16, "grpo.kept_completions_per_step": 16})
    run = stage_run("grpo", made, tmp_path, 0, ARM)
    run.folder.mkdir(parents=True)
    t = grpo.trainer(made, run, ARM, made.model.name)
    t.model.train()
    output = t._generate_and_score_completions(next(iter(t.get_train_dataloader())))
    truncated = [row["truncated"] for row in run.rows("completions")]
    tokens = [row["completion_tokens"] for row in run.rows("completions")]
    assert 2 < sum(truncated) < len(truncated) - 2, "both kinds are needed"
    kept = output["completion_mask"].sum(1).tolist()
    assert kept == [0 if cut else n for cut, n in zip(truncated, tokens, strict=True)]
    assert output["num_items_in_batch"] == sum(kept)
    last = [ids[n - 1].item() for ids, n in zip(output["completion_ids"], kept, strict=True) if n]
    assert not set(last) <= {*t.eos_token_ids}, "by the end-of-text token alone TRL would have masked them"
    t.current_gradient_accumulation_steps = 1
    for i, cut in enumerate(truncated):
        one = {name: value[i : i + 1] if value.dim() else value for name, value in output.items() if value is not None}
        t.model.zero_grad()
        t._compute_loss(t.model, one | {"advantages": torch.ones(1)}).backward()
        moved = max(weight.grad.abs().max().item() for weight in t.model.parameters() if weight.grad is not None)
        assert (moved == 0) == cut


def test_a_step_in_which_all_is_cut_off_teaches_nothing_and_goes_on(smoke, tmp_path):
    made = load_recipe("smoke", COMMON, {"grpo.mask_truncated": True, "grpo.sampling.max_new_tokens": 4, "grpo.steps": 2})
    run_stage("grpo", made, tmp_path, 0, ARM)
    rows = stage_run("grpo", made, tmp_path, 0, ARM).rows()
    assert [(row["truncated"], row["loss"], row["grad_norm"]) for row in rows] == [(1, 0, 0)] * 2


@pytest.mark.parametrize(("mode", "expected"), [
    ("none", {"stop_strings": ["</answer>"]}), ("colocate", {"stop": ["</answer>"], "include_stop_str_in_output": True})])
def test_stop_strings_reach_each_engine(mode, expected):
    made = load_recipe("paper", {"vllm.mode": mode, "vllm.nodes": 0})
    assert sampling_arguments(made) == {"generation_kwargs": expected, "vllm_importance_sampling_mode": "token_truncate"}
    assert sampling_arguments(load_recipe("nano"))["generation_kwargs"] is None
