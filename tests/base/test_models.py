"""The embedded model: special tokens, stopping, and that it learns what it is paid for."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers

from lwzlib.base import models
from lwzlib.base.kit import SMOLLM2, TINY, ModelError, is_prepared, prepare
from lwzlib.base.models import load_model
from lwzlib.base.quantities import Sampling
from lwzlib.base.recipe import load_recipe
from lwzlib.exhibits.run_tables import quarter_means, run_table
from lwzlib.method import prompts
from lwzlib.method.sampling import completions
from lwzlib.pipeline.launch import launch
from lwzlib.pipeline.stages import stage_run


@pytest.fixture(scope="module")
def nano():
    prepare(SMOLLM2)
    return load_recipe("nano")


def test_special_tokens_survive_the_conversion(nano):
    from transformers import AutoTokenizer

    folder = Path(models.resolve(SMOLLM2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids
    assert ids[0] == 1 and ids[-1] == 2
    files = json.loads((folder / "sha256.json").read_text())
    assert all(hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest for file, (_, digest) in files.items())


def test_it_answers_and_stops(nano):
    model, tokenizer = load_model(nano.model.name, nano.model.dtype, nano.model.attention)
    prompt = prompts.render_bare("What is the capital of France? Answer in one sentence.", "chat", tokenizer)
    sampling = nano.samples.sampling.model_copy(update={"temperature": 0.01, "max_new_tokens": 60})
    (_, text, truncated, _), = completions(model, tokenizer, [prompt], sampling, 1, 0)
    assert "Paris" in text and not truncated


def test_a_batch_of_prompts_resumes_at_any_row(nano, smoke):
    model, tokenizer = load_model(smoke.model.name, smoke.model.dtype, smoke.model.attention)
    texts = [f"query {i}" for i in range(7)]
    whole = list(completions(model, tokenizer, texts, smoke.samples.sampling, 2, 0))
    assert list(completions(model, tokenizer, texts, smoke.samples.sampling, 2, 0, first=5)) == whole[4:]


def test_unprepared_and_unknown_models_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("LWZ_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="lwz prepare"):
        models.resolve(SMOLLM2)
    with pytest.raises(ModelError, match="there are"):
        models.resolve("kit:gpt5")
    with pytest.raises(ModelError, match="does not exist"):
        models.resolve("/no/such/folder")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and may have flash attention")
@pytest.mark.parametrize("scorer", [False, True])
def test_an_attention_that_cannot_load_is_named_with_what_it_needs(smoke, scorer):
    with pytest.raises(ModelError, match=r"kit:tiny with model\.attention = 'flash_attention_2': .*`kernels`.*=sdpa$") as error:
        load_model(TINY, "bfloat16", "flash_attention_2", scorer=scorer)
    assert "\n" not in str(error.value)


def test_a_half_written_cache_is_not_taken_for_a_model(monkeypatch, tmp_path):
    monkeypatch.setenv("LWZ_CACHE", str(tmp_path))
    folder = prepare(TINY)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert not is_prepared(TINY)
    assert is_prepared(TINY) or (prepare(TINY) and is_prepared(TINY))


@pytest.mark.slow
def test_the_real_model_trains_with_grpo(nano, tmp_path):
    """Few steps: that it runs, that weights move, and that the cold start brought the form. Trends need the whole run."""
    r = load_recipe("nano", "launch=subprocess grpo.steps=2 grpo.queries_per_step=1 cold_start.queries=6 "
                    "grpo.sampling.max_new_tokens=64 "
                    "writing_rm.queries=8 writing_rm.passages_per_corpus=8 writing_rm.answer_tokens=48 "
                    "writing_rm.pairs_per_kind=6 writing_rm.heldout_pairs_per_kind=2")
    launch("grpo", r, tmp_path, 0, "base-nothink")
    rows = stage_run("grpo", r, tmp_path, 0, "base-nothink").rows()
    assert len(rows) == 2 and any(row["grad_norm"] > 0 for row in rows)
    start, _ = load_model(str(tmp_path / "cold-start" / "model"), "bfloat16", "eager")
    end, _ = load_model(str(tmp_path / "base-nothink" / "grpo" / "model"), "bfloat16", "eager")
    moved = [name for (name, a), b in zip(start.named_parameters(), end.parameters(), strict=True) if not torch.equal(a, b)]
    assert any("q_proj" in name for name in moved)
    assert len(quarter_means(run_table(tmp_path))) == 3


def test_a_model_to_spread_lies_where_accelerate_puts_it(smoke, monkeypatch):
    """On all GPUs where a process has several to itself, not where each is a process's own; and it writes from there."""
    device_maps, real = [], transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, device_map, **more: (
        device_maps.append(device_map), real(*args, device_map={"": "cpu"}, **more))[1])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        model, tokenizer = load_model(smoke.model.name, "float32", "eager", spread=True)
        load_model(smoke.model.name, "float32", "eager")
        patch.setenv("RANK", "0")
        load_model(smoke.model.name, "float32", "eager", spread=True)
    assert device_maps == ["auto", None, None]
    monkeypatch.setattr(model, "hf_device_map", {"": "cpu"}, raising=False)  # as accelerate leaves it
    monkeypatch.setattr(model, "to", None)  # moved no more
    (_, text, *_), = completions(model, tokenizer, ["x"], Sampling(temperature=1, top_p=1, max_new_tokens=3), 1, 0)
    assert len(text) <= 12
