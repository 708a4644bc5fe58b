"""The Writing RM on a tiny model: what training leaves, resuming, the published loss, batches, and what `quality` says."""

import json
import math
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from lwzlib.base import models, trainers
from lwzlib.base.kit import TINY
from lwzlib.base.models import load_model
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError, write_rows
from lwzlib.base.scoring import score_ids
from lwzlib.method import pairs
from lwzlib.method.pairs import data_card, load_pairs
from lwzlib.method.text import count_words
from lwzlib.method.train_writing_rm import markdown, quality, wilson
from lwzlib.method.writing_rm import Scorer, bounded_ids, token_ids
from lwzlib.pipeline.stages import run_stage, stage_run

WORDS = ["river", "lamp", "stone", "market", "bread", "window", "train", "garden", "harvest", "winter", "letter", "bridge"]


def _new_head(seed):
    torch.manual_seed(seed)
    return load_model(TINY, "float32", "sdpa", scorer=True)


def _pair_rows(count, seed=0):
    """The chosen text has one word that the rejected text never has; both are as long."""
    rng, rows = random.Random(seed), []
    for n in range(count):
        words = rng.randint(5, 9)
        chosen, rejected = rng.choices(WORDS, k=words - 1), rng.choices(WORDS, k=words)
        chosen.insert(rng.randrange(words), "zigzag")
        rows.append({"prompt": "Write.", "chosen": " ".join(chosen) + ".", "rejected": " ".join(rejected) + ".",
                     "source": f"s{n}", "kind": "word"})
    return rows


def _recipe(folder, rows, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"pairs": str(folder / "mine.jsonl"), "heldout_share": 0.4, "batch_pairs": 8, "epochs": 1} | changes
    return load_recipe("smoke", {f"writing_rm.{name}": value for name, value in settings.items()})


def _trained(r, root):
    return run_stage("writing-rm", r, root, 0).parent


def _jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _comparable(folder):
    rows = [{key: value for key, value in row.items() if key != "step_s"} for row in _jsonl(folder / "metrics.jsonl")]
    return rows, (folder / "scores.jsonl").read_text(), (folder / "quality.json").read_text()


def _alone(model, ids):
    """The oracle: each text by itself, without padding."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([each])).logits[0, 0].item() for each in ids]


@pytest.fixture(scope="module")
def scorer(smoke_rm):
    return Scorer(smoke_rm / "writing-rm" / "model", "float32", "sdpa")


def test_training_leaves_pairs_card_rows_scores_and_quality(smoke_rm, smoke):
    folder, files = smoke_rm / "writing-rm", smoke_rm / "pairs"
    made = {part: load_pairs(str(files / f"pairs_{part}.jsonl")) for part in ("train", "heldout")}
    assert {p.kind for p in made["train"]} <= set(smoke.writing_rm.kinds) and len(made["train"]) > 10
    assert not {p.source for p in made["train"]} & {p.source for p in made["heldout"]}
    assert (files / "card.csv").read_text() == data_card(made).to_csv(index=False)
    steps = math.ceil(len(made["train"]) / smoke.writing_rm.batch_pairs)
    rows = _jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(row["loss"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    scored = _jsonl(folder / "scores.jsonl")
    assert [(row["kind"], row["source"]) for row in scored] == [(p.kind, p.source) for p in made["heldout"]]
    assert json.loads((folder / "quality.json").read_text()) == quality(scored)
    info, status = (json.loads((folder / name).read_text()) for name in ("model/writing_rm.json", "status.json"))
    assert info == {"identity": status["fingerprint"], "frame": "chat", "fold_layout": True, "max_tokens": 4096,
                    "floor": min(min(row["chosen"], row["rejected"]) for row in scored)}
    assert (status["state"], status["pairs"], status["pairs_too_long"]) == ("finished", len(made["train"]), 0)


def test_training_pairs_are_balanced_in_length_and_no_held_out_pair_is_dropped(smoke_rm, smoke):
    made = {part: load_pairs(str(smoke_rm / "pairs" / f"pairs_{part}.jsonl")) for part in ("train", "heldout")}
    longer = [count_words(p.chosen) - count_words(p.rejected) for p in made["train"]]
    assert sum(d > 0 for d in longer) == sum(d < 0 for d in longer) > 0
    counts, wanted = Counter(p.kind for p in made["heldout"]), smoke.writing_rm.heldout_pairs_per_kind
    assert {counts[kind] for kind in ("shuffled", "repeated", "padded", "truncated")} == {wanted}


def test_a_finished_model_is_loaded_and_another_recipe_refused(smoke_rm, smoke, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("trained again"))
    assert run_stage("writing-rm", smoke, smoke_rm, 0) == smoke_rm / "writing-rm" / "model"
    assert run_stage("writing-rm", load_recipe("smoke", "grpo.steps=9"), smoke_rm, 0).is_dir()
    with pytest.raises(RunError, match=r"writing_rm\.epochs was 1, is 2"):
        run_stage("writing-rm", load_recipe("smoke", "writing_rm.epochs=2"), smoke_rm, 0)


def test_the_saved_model_gives_the_scores_that_were_reported(smoke_rm, scorer):
    heldout = load_pairs(str(smoke_rm / "pairs" / "pairs_heldout.jsonl"))
    reported = _jsonl(smoke_rm / "writing-rm" / "scores.jsonl")
    for side in ("chosen", "rejected"):
        again = scorer([(p.prompt, getattr(p, side)) for p in heldout], batch_tokens=3000)
        np.testing.assert_allclose(again, [row[side] for row in reported], atol=1e-5)
    assert np.std([row["chosen"] for row in reported]) > 1e-3, "equal scores cannot show anything"


def test_interrupted_training_goes_on_to_the_same_rows_and_scores(smoke, tmp_path):
    few = {"kinds": ["shuffled", "stuffed", "repeated", "human_model"], "queries": 3, "passages_per_corpus": 12,
           "epochs": 6}  # enough steps on any Python: the pairs are made from its own documentation, and differ with it
    r = load_recipe("smoke", {f"writing_rm.{name}": value for name, value in few.items()})
    whole, stopped = _trained(r, tmp_path / "whole"), tmp_path / "stopped" / "writing-rm"
    made = set()
    for name, times in (("on_log", 1), ("on_log", 3), ("on_save", 1)):
        real, left = getattr(trainers.Rows, name), iter([None] * (times - 1))

        def stop(*args, real=real, left=left, **kwargs):
            real(*args, **kwargs)
            if next(left, "last") == "last":
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainers.Rows, name, stop)
            _trained(r, stopped.parent)
        status = json.loads((stopped / "status.json").read_text())
        made.add((stopped.parent / "pairs" / "pairs_train.jsonl").stat().st_mtime_ns)
        assert (status["state"], (stopped / "model").exists()) == ("interrupted", False)
    assert (status["checkpoint_step"], len(made)) == (4, 1), "from the checkpoint, with the pairs that were made once"
    _trained(r, stopped.parent)
    assert len(_comparable(whole)[0]) > 4
    assert _comparable(stopped) == _comparable(whole)
    first, second = ((folder.parent / "pairs" / "pairs_train.jsonl").read_text() for folder in (stopped, whole))
    assert first == second


def test_a_stop_between_the_two_files_of_pairs_makes_both_again(tmp_path, monkeypatch):
    r = _recipe(tmp_path, _pair_rows(20))
    run, calls = stage_run("pairs", r, tmp_path, 0), []

    def stop_at_the_second(path, rows):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_rows(path, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pairs, "write_rows", stop_at_the_second)
        run_stage("pairs", r, tmp_path, 0)
    assert not run.finished and [path.exists() for path in calls] == [True, False]
    folder = run_stage("pairs", r, tmp_path, 0)
    assert all(load_pairs(str(folder / file)) for file in pairs.PAIR_FILES)


def test_it_learns_a_plain_preference_of_a_file_of_pairs(smoke, tmp_path):
    folder = _trained(_recipe(tmp_path, _pair_rows(160), batch_pairs=16, epochs=3, learning_rate=5e-3), tmp_path / "run")
    found = json.loads((folder / "quality.json").read_text())
    assert found["accuracy"]["word"][0] > 0.8 and found["accuracy"]["all"][3] == 64
    assert found["margin"] > 0.5 and found["length_alone"] == 0.5
    train_rows, heldout_rows = (_jsonl(folder.parent / "pairs" / f"pairs_{part}.jsonl") for part in ("train", "heldout"))
    assert sorted(row["source"] for row in train_rows + heldout_rows) == sorted(row["source"] for row in _pair_rows(160))
    scorer = Scorer(folder / "model", "float32", "eager")
    asked = [("Write.", f"river {word} lamp stone.") for word in ("zigzag", "market", "zigzag zigzag")]
    assert (scores := scorer(asked))[0] > scores[1] < scores[2]


def test_the_loss_is_the_published_one(smoke, tmp_path):
    r = _recipe(tmp_path, _pair_rows(10), batch_pairs=99, length_balanced=False)
    folder = _trained(r, tmp_path / "run")
    made = load_pairs(str(folder.parent / "pairs" / "pairs_train.jsonl"))
    model, tokenizer = _new_head(0)
    asked = [[(p.prompt, getattr(p, side)) for p in made] for side in ("chosen", "rejected")]
    chosen, rejected = (np.array(_alone(model, token_ids(tokenizer, "chat", True, texts))) for texts in asked)
    (row,) = _jsonl(folder / "metrics.jsonl")
    assert row["loss"] == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), abs=1e-5)
    assert row["accuracy"] == pytest.approx((chosen > rejected).mean(), abs=1e-6)
    assert row["margin"] == pytest.approx((chosen - rejected).mean(), abs=1e-5)


def test_a_lora_is_merged_into_the_model_that_is_saved(smoke, tmp_path):
    r = _recipe(tmp_path, _pair_rows(40), **{"lora.rank": 4, "learning_rate": 1e-2})
    folder = _trained(r, tmp_path / "run")
    heldout = load_pairs(str(folder.parent / "pairs" / "pairs_heldout.jsonl"))
    again = Scorer(folder / "model", "float32", "sdpa")([(p.prompt, p.chosen) for p in heldout])
    np.testing.assert_allclose(again, [row["chosen"] for row in _jsonl(folder / "scores.jsonl")], atol=1e-5)
    base, _ = _new_head(0)
    saved, _ = load_model(str(folder / "model"), "float32", "sdpa", scorer=True)
    changed = {name for (name, a), b in zip(base.named_parameters(), saved.parameters(), strict=True) if not torch.equal(a, b)}
    assert {"score.weight", "model.layers.0.self_attn.q_proj.weight"} <= changed
    assert not any("mlp" in name or "embed" in name for name in changed), "only the modules that the recipe names"


def test_the_seed_draws_the_head(smoke):
    heads = [_new_head(seed)[0].score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_scorer_that_is_loaded_in_the_midst_of_training_draws_nothing(smoke_rm):
    torch.manual_seed(3)
    untouched = torch.random.get_rng_state()
    Scorer(smoke_rm / "writing-rm" / "model", "float32", "sdpa")
    assert torch.equal(torch.random.get_rng_state(), untouched)


def test_pairs_that_are_all_too_long_are_refused(smoke, tmp_path):
    with pytest.raises(RunError, match=r"writing_rm\.max_tokens = 16"):
        _trained(_recipe(tmp_path, _pair_rows(10), max_tokens=16), tmp_path / "run")


def test_pairs_that_are_too_long_are_left_out_and_counted(smoke, tmp_path):
    rows = _pair_rows(20)
    for row in rows[::2]:
        row["rejected"] = row["rejected"].replace(".", " stone stone stone.")
        row["chosen"] = row["chosen"].replace(".", " stone stone stone" * 20 + ".")
    folder = _trained(_recipe(tmp_path, rows, max_tokens=200, length_balanced=False), tmp_path / "run")
    train_rows = _jsonl(folder.parent / "pairs" / "pairs_train.jsonl")
    status = json.loads((folder / "status.json").read_text())
    long = sum(len(row["chosen"]) > 200 for row in train_rows)
    assert 0 < long < len(train_rows) == status["pairs"]
    assert (status["pairs_too_long"], status["step"]) == (long, math.ceil((len(train_rows) - long) / 8))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90), max_size=12), st.integers(1, 400), st.integers(0, 9))
def test_scores_in_batches_equal_scores_one_at_a_time(scorer, lengths, batch_tokens, seed):
    rng, sizes = random.Random(seed), []
    ids = [[rng.randrange(256) for _ in range(length)] for length in lengths]
    ids += [list(each) for each in ids[:3]]  # some texts twice
    seen = scorer.model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape),
                                                  with_kwargs=True)
    found = score_ids(scorer.model, ids, batch_tokens)
    seen.remove()
    np.testing.assert_allclose(found, _alone(scorer.model, ids), atol=2e-5)
    assert found[len(lengths) :] == found[: len(found) - len(lengths)], "the same text gets the very same score"
    assert sum(texts for texts, _ in sizes) == len(set(map(tuple, ids))), "and is scored once"
    assert all(texts == 1 or texts * longest <= batch_tokens for texts, longest in sizes)
    assert all((texts + 1) * longest > batch_tokens for texts, longest in sizes[:-1]), "each batch but the last is full"


def test_texts_are_scored_in_their_order_whatever_the_batches(scorer):
    texts = [("Write about rain.", "The rain fell. " * n) for n in (5, 1, 9, 2)]
    texts += [("写雨。", "下雨了。"), ("", ""), ("p", "\ud800")]
    one_by_one = [scorer([text])[0] for text in texts]
    for batch_tokens in (1, 150, 100_000):
        np.testing.assert_allclose(scorer(texts, batch_tokens), one_by_one, atol=2e-5)
    np.testing.assert_allclose(scorer(texts[::-1]), one_by_one[::-1], atol=2e-5)
    assert len(set(np.round(one_by_one, 4))) > 4
    assert scorer([]) == []


@pytest.mark.parametrize(("frame", "prompt", "text", "framed"), [
    ("chat", "Write.", "Rain\n\n fell.", "<|im_start|>user\nWrite.<|im_end|>\n<|im_start|>assistant\n"),
    ("plain", "写。", "雨。\n雪。", "用户：写。\n\n助手： ")])
def test_tokens_are_those_of_the_frame_and_the_text_alone(scorer, frame, prompt, text, framed):
    for fold_layout, kept in ((False, text), (True, " ".join(text.split()))):
        (ids,) = token_ids(scorer.tokenizer, frame, fold_layout, [(prompt, text)])
        assert scorer.tokenizer.decode(ids) == framed + kept


def test_paragraphs_do_not_move_a_score_that_folds_the_layout(scorer, monkeypatch):
    texts = [("Write\nof rain.", "Rain fell. It stopped."), ("Write\nof rain.", "\nRain  fell.\n\nIt stopped.\n")]
    assert np.ptp(scorer(texts)) < 1e-6
    ids = bounded_ids(scorer.tokenizer, scorer.info, texts)
    assert ids[0] == ids[1]
    monkeypatch.setitem(scorer.info, "fold_layout", False)
    assert np.ptp(scorer(texts)) > 1e-5


def test_a_text_that_is_too_long_is_named_with_its_tokens_and_the_limit(scorer):
    frame = bounded_ids(scorer.tokenizer, scorer.info, [("p", "")])[0]
    fits = ("p", "x" * (4096 - len(frame)))
    assert len(scorer([fits])) == 1
    with pytest.raises(RunError, match=r"text 2 has 4097 tokens with its prompt; .* at most 4096 \(writing_rm\.max_tokens\)"):
        scorer([("p", "short"), fits, (fits[0], fits[1] + "x")])


def test_markdown_keeps_the_words():
    text = "One day it rained.\n\nThen it stopped."
    marked = markdown(text)
    assert marked != text and marked.count("**") == 4
    assert marked.replace("*", "").replace("-", "").split() == text.split()


def _rows(margins, kind="k"):
    """Rows whose scores differ by `margins`."""
    return [{"kind": kind, "source": "s", "language": "en", "chosen": i / 8 + m, "rejected": i / 8, "chosen_words": 9 + i,
             "rejected_words": 9, "markdown": 0.0} for i, m in enumerate(margins)]


@pytest.mark.parametrize(("wins", "of", "low", "high"), [  # from tables of Wilson's interval
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)])
def test_accuracy_has_wilsons_interval(wins, of, low, high):
    found = quality(_rows([1.0] * wins + [-1.0] * (of - wins)) + _rows([2.0], "other"))["accuracy"]
    assert found["k"] == [pytest.approx(wins / of), pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4), of]
    assert found["other"][::3] == [1.0, 1] and found["all"][::3] == [pytest.approx((wins + 1) / (of + 1)), of + 1]
    expected = binomtest(wins, of).proportion_ci(method="wilson")
    assert wilson(wins / of, of) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_tie_is_half_a_win_in_every_measure():
    found = quality(_rows([0.0, 0.0, 1.0, 1.0]))
    assert found["accuracy"]["all"][0] == found["accuracy"]["k"][0] == 0.75
    assert sum(observed * n for _, observed, n in found["calibration"]) / 4 == 0.75
    assert found["margin"] == 0.5


@pytest.mark.parametrize(("margins", "gap"), [
    ([20.0 + i for i in range(20)], 0.0), ([-20.0 - i for i in range(20)], 1.0), ([0.0] * 20, 0.0)])
def test_calibration_of_known_margins(margins, gap):
    found = quality(_rows(margins))
    assert found["calibration_gap"] == pytest.approx(gap, abs=1e-6)
    assert [n for _, _, n in found["calibration"]] == [4] * 5
    share = sum(observed * n for _, observed, n in found["calibration"]) / 20
    assert share == pytest.approx(np.mean([0.5 if m == 0 else m > 0 for m in margins]))


def test_calibration_tells_a_calibrated_model_from_a_boastful_one():
    rng = np.random.default_rng(0)
    sure = rng.exponential(1.5, 4000)
    margins = np.where(rng.random(4000) < 1 / (1 + np.exp(-sure)), sure, -sure)
    honest, boastful = quality(_rows(margins)), quality(_rows(margins * 4))
    assert honest["calibration_gap"] < 0.025
    assert boastful["calibration_gap"] > 0.1
    expected = [e for e, _, _ in honest["calibration"]]
    assert expected == sorted(expected) and expected[0] > 0.5
    fifths = np.array_split(np.argsort(np.abs(margins)), 5)
    for (e, o, n), part in zip(honest["calibration"], fifths, strict=True):
        assert (e, o) == pytest.approx(((1 / (1 + np.exp(-sure[part]))).mean(), (margins[part] > 0).mean()))
        assert n == 800


def test_floor_length_markdown_and_languages_are_those_of_the_rows():
    rng = random.Random(0)
    rows = [{"kind": "k", "source": "s", "language": rng.choice(["en", "zh"]), "chosen": rng.gauss(1, 1),
             "rejected": rng.gauss(0, 1), "chosen_words": rng.randint(5, 9), "rejected_words": rng.randint(5, 9)}
            for _ in range(60)]
    for row in rows[::4]:
        row["markdown"] = row["chosen"] + 0.7
    found = quality(rows)
    every = [row[side] for row in rows for side in ("chosen", "rejected")]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert found["floor"] == quality(swapped)["floor"] == min(every)
    longer, same = (sum(test(r["chosen_words"], r["rejected_words"]) for r in rows) for test in (int.__gt__, int.__eq__))
    assert found["length_alone"] == pytest.approx((longer + same / 2) / 60)
    assert found["markdown_shift"] == pytest.approx(0.7 / np.std(every))
    assert found["languages"] == {name: pytest.approx(np.mean([r["chosen"] for r in rows if r["language"] == name]))
                                  for name in ("en", "zh")}
    assert abs(found["length_correlation"]) < 0.4


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_that_counts_words_is_told_by_its_length_correlation(sign):
    rows = [row | {"chosen_words": 50 + sign * i**2, "rejected": 0.0} for i, row in enumerate(_rows([0.1] * 7))]
    assert quality(rows)["length_correlation"] == pytest.approx(sign)


def test_a_model_of_another_kind_is_not_taken_for_a_writing_rm(smoke, tmp_path):
    shutil.copytree(models.resolve(TINY), tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"writing_rm\.json"):
        Scorer(tmp_path / "model", "float32", "sdpa")
