"""Documents that are packed into one sequence do not see each other: in the trainers' own forward passes, a packed
document is read as if it were alone, with every attention that a recipe names."""

import json

import pytest
import torch
from transformers import masking_utils
from trl import SFTTrainer

from lwzlib.base.recipe import load_recipe, presets
from lwzlib.method import pretrain, sft
from lwzlib.pipeline.stages import run_stage

ATTENTIONS = [pytest.param(name, marks=[pytest.mark.gpu] * name.startswith("flash"))
              for name in sorted({load_recipe(preset).model.attention for preset in presets()})]


class Compared(SFTTrainer):
    """Compares the last hidden states of each packed batch with those of each document alone: notes the largest difference, the
    number of documents, and whether keys and values are cached."""

    differences: list[float]
    documents: list[int]
    cached: set

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, starts = inputs["input_ids"][0], (inputs["position_ids"][0] == 0).nonzero().flatten()
        sizes = torch.diff(starts, append=starts.new_tensor([len(ids)])).tolist()
        with torch.no_grad():
            alone = torch.cat([model.model(document[None], use_cache=False).last_hidden_state[0]
                               for document in ids.split(sizes)])

        def compare(module, args, kwargs, output):
            self.differences.append((output.last_hidden_state[0] - alone).abs().max().item())
            self.documents.append(len(sizes))
            self.cached.add(kwargs["use_cache"])

        hook = model.model.register_forward_hook(compare, with_kwargs=True)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hook.remove()
        return loss


@pytest.fixture
def compared(monkeypatch):
    """The trainer of pretraining and of fine-tuning, which compares."""
    for name, value in (("differences", []), ("documents", []), ("cached", set())):
        monkeypatch.setattr(Compared, name, value, raising=False)
    for module in (pretrain, sft):
        monkeypatch.setattr(module, "SFTTrainer", Compared)
    return Compared


def train(stage, attention, folder):
    """Pretraining or fine-tuning of kit:tiny on short documents, several in a sequence; no gradient checkpointing, which would
    turn the cache off by itself."""
    data, dtype = folder / "rows.jsonl", "bfloat16" if attention.startswith("flash") else "float32"
    turns = [[("user", f"Write {n}."), ("assistant", f"Here is number {n}. " * (n % 3 + 1))] for n in range(12)]
    data.write_text("".join(json.dumps({"messages": [{"role": role, "content": text} for role, text in turn]}) + "\n"
                            for turn in turns))
    recipe = load_recipe("smoke", {
        "model.attention": attention, "model.dtype": dtype, "grpo.gradient_checkpointing": False, "cold_start.queries": 0,
        "pretrain.cot_token_fraction": 0.0, "pretrain.sequence_tokens": 1024, "pretrain.tokens": 6_000,
        "corpus.sources": [{"at": "kit:python-docs", "language": "en", "weight": 1.0}], "corpus.max_words": 120,
        "sft.data": str(data), "sft.batch_sequences": 1, "sft.max_tokens": 2048})
    run_stage(stage, recipe, folder, 0, "sft" if stage == "sft" else "")
    return 0.1 if dtype == "bfloat16" else 1e-5


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_packed_document_is_read_as_if_it_were_alone(stage, attention, compared, smoke, tmp_path):
    tolerance = train(stage, attention, tmp_path)
    assert max(compared.documents) > 1 and len(compared.differences) > 1
    assert max(compared.differences) < tolerance
    assert compared.cached == {False}, "with a cache, transformers builds no mask between documents"


def test_documents_that_see_each_other_are_noticed(compared, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    train("sft", "sdpa", tmp_path)
    assert max(compared.differences) > 0.01
