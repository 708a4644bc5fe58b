"""What AdamW's small steps do to weights of either dtype, on a small random model: each stage that trains, as in `gpu`."""

import json

import pytest
import torch
from transformers import TrainingArguments
from trl import GRPOTrainer

from lwzlib.base import fast_cpu, models, trainers
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import write_rows
from lwzlib.method import pretrain, sft, train_writing_rm
from lwzlib.pipeline.stages import run_stage, stage_run

ARM = "base-think"
SENTENCES = ["The river rose in the night, and the mill stood in water.", "She counted the letters twice before she slept.",
             "On the third day the wind turned, and the ships came home.", "Nobody in the village had seen such a lamp before."]


@pytest.fixture
def small(smoke, tmp_path, monkeypatch):
    """Recipe `gpu` on a random model with a few steps of a few texts, and a way to see the weights after a stage."""
    monkeypatch.setattr(fast_cpu, "computed_in", lambda dtype: dtype)  # also on a CPU without a bfloat16 product
    monkeypatch.setattr(trainers, "computed_in", lambda dtype: dtype)
    answers = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(4)] * 3
    write_rows(tmp_path / "answers.jsonl", [
        {"messages": [{"role": "user", "content": f"Write of river {i}."}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)])
    write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": f"Write of river {i}.", "chosen": answer, "rejected": answer[::-1], "source": str(i)}
        for i, answer in enumerate(answers)])
    common = {"model.name": "kit:tiny", "writing_rm.model": "kit:tiny", "launch": "inline", "vllm.mode": "none",
              "cold_start.queries": 0, "reward.weights.writing": 0.0, "reward.format.encoder": "", "model.frame": "plain",
              "sft.data": str(tmp_path / "answers.jsonl"), "sft.max_tokens": 512, "sft.batch_sequences": 1, "sft.epochs": 1,
              "writing_rm.pairs": str(tmp_path / "pairs.jsonl"), "writing_rm.batch_pairs": 2, "writing_rm.heldout_share": 0.2,
              "pretrain.tokens": 8000, "pretrain.sequence_tokens": 256, "pretrain.batch_sequences": 4, "pretrain.shards": 2,
              "pretrain.cot_token_fraction": 0.0, "pretrain.heldout_tokens": 64, "pretrain.warmup_steps": 0,
              "corpus.sources": [{"at": "kit:python-docs", "language": "en", "weight": 1.0}], "corpus.parts": 2,
              "grpo.steps": 3, "grpo.sampling.max_new_tokens": 64, "grpo.queries_per_step": 2, "evaluation.every_steps": 0}
    return lambda **more: load_recipe("gpu", common | more)


def updates(stage, made, root, monkeypatch) -> torch.Tensor:
    """Change of all weights in a stage; for GRPO the completions and rewards are always the same."""
    seen = {}

    def begin(trainer, checkpoint=None, train=trainers.train_to_end):
        seen["before"] = flat(trainer.model)
        model = train(trainer, checkpoint)
        seen["after"] = flat(model)
        return model

    def same_bytes(self, prompt_ids, *_, **__):
        return [[*SENTENCES[i % 4].encode()[: 20 + 7 * i], self._tokenizer.eos_token_id] for i in range(len(prompt_ids))], None

    with monkeypatch.context() as patch:
        patch.setattr(trainers, "train_to_end", begin)
        patch.setattr(GRPOTrainer, "_generate_single_turn", same_bytes)
        patch.setattr(GRPOTrainer, "_calculate_rewards", lambda self, inputs, *_: torch.tensor(
            [[float(i % 3), float(i % 2)] for i in range(len(inputs))]))
        run_stage(stage, made, root, 0, {"sft": "sft", "grpo": ARM}.get(stage, ""))
    return seen["after"] - seen["before"]


def flat(model) -> torch.Tensor:
    """All weights of a model but those that are drawn anew: the head of a Writing RM."""
    kept = [value for name, value in model.named_parameters() if "score" not in name]
    return torch.cat([value.detach().float().ravel().clone() for value in kept])


def share_moved(change: torch.Tensor) -> float:
    return (change != 0).float().mean().item()


@pytest.mark.parametrize("stage", ["sft", "pretrain", "writing-rm", "grpo"])
def test_bfloat16_learns_what_float32_learns(small, tmp_path, monkeypatch, stage):
    ours, theirs = (updates(stage, small(**{"model.dtype": dtype}), tmp_path / dtype, monkeypatch)
                    for dtype in ("bfloat16", "float32"))
    assert share_moved(ours) > 0.95 * share_moved(theirs) > 0.3
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.9


def test_bfloat16_weights_would_lose_it(small, tmp_path, monkeypatch):
    theirs = updates("grpo", small(**{"model.dtype": "float32"}), tmp_path / "float32", monkeypatch)
    monkeypatch.setattr(trainers, "_is_whole", lambda lora: False)  # weights of the recipe's dtype, and no autocast
    lost = updates("grpo", small(), tmp_path / "bfloat16", monkeypatch)
    assert share_moved(lost) < share_moved(theirs) / 3 and torch.corrcoef(torch.stack([lost, theirs]))[0, 1] < 0.5


def test_a_model_is_saved_in_the_dtype_of_the_recipe(small, tmp_path):
    from safetensors.torch import load_file

    made = small(**{"evaluation.every_steps": 2})
    folder = run_stage("grpo", made, tmp_path, 0, ARM)
    for place in (folder, folder.parent / "snapshots" / "2"):
        weights = load_file(place / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.bfloat16} and "lm_head.weight" not in weights, "it is tied"
        assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16", "vLLM reads it there"
        assert models.load_tokenizer(str(place)).eos_token_id == models.load_tokenizer("kit:tiny").eos_token_id
    last = load_file(folder.parent / "checkpoints" / stage_run("grpo", made, tmp_path, 0, ARM).status["checkpoint"]
                     / "model.safetensors")
    assert {value.dtype for value in last.values()} == {torch.float32}, "a resumed run goes on from all digits"
    written = load_file(folder / "model.safetensors")
    assert all((value.bfloat16() == written[name]).all() for name, value in last.items() if name in written)


def test_adapters_are_float32_and_their_model_stays_small(small):
    made = small(**{"grpo.lora.rank": 4})
    assert trainers.load_trainee(made, "kit:tiny", made.grpo.lora)[0].dtype == torch.bfloat16
    assert trainers.load_trainee(made, "kit:tiny")[0].dtype == torch.float32


@pytest.mark.parametrize("module", [sft, pretrain, train_writing_rm])
def test_no_stage_loads_what_it_trains_in_another_way(module):
    assert not hasattr(module, "load_policy") and not hasattr(module, "load_model")


def test_a_rank_waits_two_hours_for_the_others(smoke, tmp_path):
    """torch's default ends a run in which one rank judges or saves for longer than half an hour."""
    run = stage_run("grpo", load_recipe("smoke"), tmp_path, 0, ARM)
    given = TrainingArguments(**trainers.trainer_arguments(run.recipe, run, 5))
    assert given.ddp_timeout_delta.total_seconds() == 7200
