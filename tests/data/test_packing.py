"""Mixing and packing: shares by token, boundaries kept apart in attention, shards that come out the same and are mended."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from killing import killed_then_finished
from trl import SFTConfig, SFTTrainer

from lwzlib.base.kit import TINY
from lwzlib.base.models import load_model, load_tokenizer
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError
from lwzlib.data import packing, tokenise
from lwzlib.pipeline.stages import run_stage, stage_run

MIX = {"pretrain.tokens": 60_000, "pretrain.cot_token_fraction": 0.1, "pretrain.shards": 2, "corpus.parts": 2,
       "pretrain.sequence_tokens": 200, "cot.exact_only": False,
       "corpus.sources": [{"at": "a", "language": "en", "weight": 3.0}, {"at": "b", "language": "zh", "weight": 1.0}]}


def token_file(path, documents):
    """In datatrove's form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate([np.array(d, dtype="<u2") for d in documents]).tofile(path)
    np.cumsum([len(d) for d in documents]).astype("<u8").tofile(f"{path}.index")


@pytest.fixture
def made(smoke, tmp_path):
    """(recipe, corpus, cot): token files in which each document has a token of its own source, and a number."""
    r = load_recipe("smoke", MIX)
    draw = random.Random(0)
    for folder, sources, longest in (("corpus", 2, 900), ("cot", 1, 150)):
        load_tokenizer(r.model.name).save_pretrained(tmp_path / folder / "tokenizer")
        for source in range(sources):
            for path in tokenise.token_files(tmp_path / folder, source, 2):
                token_file(path, [[draw.randrange(200) for _ in range(draw.randint(5, longest))] for _ in range(120)])
    return r, tmp_path / "corpus", tmp_path / "cot"


def packed(made, folder):
    r, corpus, cot = made
    run = stage_run("pack", r, folder, 0)
    packing.pack(r, run, corpus, cot)
    return run


def documents(run, r):
    """(source, tokens) of each document in each sequence."""
    for row in run.rows("shards"):
        for sequence in Dataset.from_file(str(run.folder / row["file"])):
            assert sum(sequence["seq_lengths"]) == len(sequence["input_ids"]) <= r.pretrain.sequence_tokens
            assert len(sequence["seq_lengths"]) == len(sequence["source"])
            ends = np.cumsum(sequence["seq_lengths"])
            for source, start, end in zip(sequence["source"], [0, *ends], ends, strict=False):
                yield source, tuple(sequence["input_ids"][start:end])


def test_shares_are_those_of_the_recipe_to_a_tenth_of_a_point(made, tmp_path):
    r, *_ = made
    run = packed(made, tmp_path / "run")
    counted = Counter()
    for source, tokens in documents(run, r):
        counted[source] += len(tokens)
    total = sum(counted.values())
    assert total == pytest.approx(r.pretrain.tokens, rel=0.05), "up to half a chain-of-thought document a shard"
    assert counted[2] / total == pytest.approx(r.pretrain.cot_token_fraction, abs=0.001)
    assert counted[0] / (counted[0] + counted[1]) == pytest.approx(0.75, abs=0.001)
    said = Counter()
    for row in run.rows("shards"):
        said.update(row["tokens"])
    assert said == {"a (en)": counted[0], "b (zh)": counted[1], "cot": counted[2]}
    sequences = sum(row["sequences"] for row in run.rows("shards"))
    assert run.rows("shards")[0]["padding"] < 0.05 and sequences * 200 >= total


def test_every_document_is_a_piece_of_its_own_source_and_cot_stays_whole(made, tmp_path):
    r, corpus, cot = made
    texts = {}
    for folder, first in ((corpus, 0), (cot, 2)):
        for source in range(2 if folder == corpus else 1):
            texts[first + source] = []
            for path in tokenise.token_files(folder, source, 2):
                ends = np.fromfile(f"{path}.index", "<u8").astype(int)
                tokens = np.fromfile(path, "<u2").tolist()
                texts[first + source] += [tuple(tokens[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    pieces = {source: {text[i : i + 200] for text in found for i in range(0, len(text), 200)}
              for source, found in texts.items()}
    cut = 0
    for source, tokens in documents(packed(made, tmp_path / "run"), r):
        if source == 2:
            assert tokens in texts[2]
        elif tokens not in pieces[source]:
            assert any(piece[: len(tokens)] == tokens for piece in pieces[source])
            cut += 1
    assert cut <= 2 * r.pretrain.shards, "only the last piece of a source in a shard may be cut"


def test_a_small_source_is_gone_through_again_and_says_so(made, tmp_path):
    _, corpus, _ = made
    for path in tokenise.token_files(corpus, 1, 2):
        token_file(path, [[1, 2, 3, 4, 5] * 20])
    run = packed(made, tmp_path / "run")
    row = run.rows("shards")[0]
    assert row["epochs"]["b (zh)"] == pytest.approx(row["tokens"]["b (zh)"] / 100, abs=1e-3) and row["epochs"]["b (zh)"] > 10
    assert row["epochs"]["a (en)"] < 1


def test_an_empty_source_is_refused_by_name(made, tmp_path):
    _, corpus, _ = made
    path = tokenise.token_files(corpus, 1, 2)[0]
    path.write_bytes(b"")
    Path(f"{path}.index").write_bytes(b"")
    with pytest.raises(RunError, match="corpus source b has no tokens for shard 0"):
        packed(made, tmp_path / "run")


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named_and_made_again(made, tmp_path, harm, capsys):
    run = packed(made, tmp_path / "run")
    path = run.folder / "00001.arrow"
    whole, other = path.read_bytes(), (run.folder / "00000.arrow").stat().st_mtime_ns
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:] if harm == "flip" else whole[:-900])
    assert run.finished
    packed(made, tmp_path / "run")
    assert "00001.arrow is damaged or missing" in capsys.readouterr().out
    assert path.read_bytes() == whole and len(run.rows("shards")) == 2 and run.finished
    assert (run.folder / "00000.arrow").stat().st_mtime_ns == other, "the whole shard is left alone"


def test_a_shard_that_comes_out_different_is_an_error(made, tmp_path):
    run = packed(made, tmp_path / "run")
    (run.folder / "00000.arrow").unlink()
    token_file(tokenise.token_files(made[1], 0, 2)[0], [[7] * 500] * 100)
    with pytest.raises(RunError, match="came out different"):
        packed(made, tmp_path / "run")


def test_killed_while_packing_gives_the_same_bytes(smoke, tmp_path):
    r = load_recipe("smoke", "pretrain.cot_token_fraction=0.0 corpus.parts=4 pretrain.shards=4 pretrain.tokens=4000000")
    run_stage("corpus", r, tmp_path / "whole", 0)
    whole = run_stage("pack", r, tmp_path / "whole", 0)
    run_stage("corpus", r, tmp_path / "killed", 0)

    def begun(shard):
        return lambda run: any(path.exists() for path in (run.folder / f"{shard:05d}.part", run.folder / f"{shard:05d}.arrow"))

    killed = killed_then_finished("pack", r, tmp_path / "killed", [begun(0), begun(1), begun(3)]).folder
    assert [(whole / f"{n:05d}.arrow").read_bytes() == (killed / f"{n:05d}.arrow").read_bytes() for n in range(4)] == [True] * 4
    assert (whole / "shards.jsonl").read_bytes() == (killed / "shards.jsonl").read_bytes()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_document_attends_to_another_in_its_sequence(smoke, made, tmp_path, attention):
    """Loss of every token as if its document stood alone, through the very trainer and collator of the stage."""
    run = packed(made, tmp_path / "run")
    model, tokenizer = load_model(TINY, "float32", attention)
    rows = [row for row in Dataset.from_file(str(run.folder / "00000.arrow")) if len(row["seq_lengths"]) > 2][:2]
    trainer = SFTTrainer(model, args=SFTConfig(
        output_dir=str(tmp_path), padding_free=True, max_length=None, use_cpu=True, bf16=False, report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True}), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator(rows)
    labels = batch.pop("labels")

    def losses(ids, **more):
        with torch.no_grad():
            logits = model(input_ids=ids, **more).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")

    together = losses(**{"ids": batch.pop("input_ids"), **batch})
    alone, first = [], 0
    for row in rows:
        ends = np.cumsum(row["seq_lengths"])
        for start, end in zip([0, *ends], ends, strict=False):
            ids = torch.tensor([row["input_ids"][start:end]])
            torch.testing.assert_close(together[first : first + end - start - 1], losses(ids), atol=1e-4, rtol=1e-4)
            alone.append(losses(ids))
            first += end - start
    assert (labels[0] == -100).sum() == sum(len(row["seq_lengths"]) for row in rows), "no first token is predicted"
    mixed = losses(torch.tensor([rows[0]["input_ids"]]))[rows[0]["seq_lengths"][0] :][: len(alone[1])]
    assert (mixed - alone[1]).abs().max() > 1e-3, "without boundaries the losses differ: the test can fail"


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 10**9))
def test_quotas_are_whole_and_add_up(weights, tokens):
    found = packing.quotas(weights, tokens)
    assert sum(found) == tokens and all(isinstance(n, int) for n in found)
    assert all(abs(n - tokens * w / sum(weights)) <= 1 for n, w in zip(found, weights, strict=True))


def test_the_furthest_behind_is_drawn_next(made):
    _, corpus, _ = made
    sources = [packing.Pieces(tokenise.token_files(corpus, s, 2), 200, 0) for s in range(2)]
    drawn = [0, 0]
    for number, piece in packing.interleave(sources, [30_000, 10_000], []):
        drawn[number] += len(piece)
        if sum(drawn) > 4000:
            assert drawn[0] / sum(drawn) == pytest.approx(0.75, abs=0.05), "the mixture holds all along, not only at the end"
    assert drawn == [30_000, 10_000]


def test_no_document_for_the_chain_of_thought_says_so(made, tmp_path):
    r, corpus, cot = made
    for path in tokenise.token_files(cot, 0, 2):
        path.write_bytes(b"")
        Path(f"{path}.index").write_bytes(b"")
    with pytest.raises(RunError, match="no chain-of-thought document for a shard"):
        packed((r, corpus, cot), tmp_path / "run")
