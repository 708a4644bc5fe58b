"""Preference pairs: the schema, splits by source, balanced lengths, and what each kind of made pair prefers."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwzlib.base.rows import DataError, write_rows
from lwzlib.data.damage import DAMAGES, plain
from lwzlib.data.made import KINDS, Original, build_pairs, human_originals
from lwzlib.method.pairs import Pair, balance_lengths, data_card, load_pairs, split_by_source
from lwzlib.method.text import count_words, has_han

GOOD = {"prompt": "Write.", "chosen": "A good text.", "rejected": "A bad text.", "source": "s1"}
KINDS = sorted(KINDS)


def _file(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def _text(source, seed=0, sentences=6, chinese=False):
    """Sentences in words that no other source has."""
    rng, words = random.Random(f"{source} {seed}"), random.Random(source)
    if chinese:
        characters = [chr(words.randrange(0x4E00, 0x9FFF)) for _ in range(60)]
        return "".join("".join(rng.choices(characters, k=rng.randint(8, 16))) + "。" for _ in range(sentences))
    vocabulary = ["".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(60)]
    return " ".join(" ".join(rng.choices(vocabulary, k=rng.randint(8, 12))).capitalize() + "." for _ in range(sentences))


def _originals(documents=6, queries=6, chinese=False):
    """Two passages of each document, with a continuation; and two answers to each query."""
    def made(source, human):
        texts = [_text(source, k, chinese=chinese) for k in (0, 1)]
        return [Original(source, f"Prompt of {source}.", texts[k], human,
                         f"{_text(source, 2 + k, 3, chinese)}" if human else texts[1 - k]) for k in (0, 1)]

    sources = [(f"book/{n}", True) for n in range(documents)] + [(f"query-{n}", False) for n in range(queries)]
    return [original for source in sources for original in made(*source)]


MIXED = _originals() + _originals(3, 3, chinese=True)


def _words(text):
    return set(re.findall(r"[a-z]+|[\u4e00-\u9fff]", text.lower()))


def _one(kind, *originals):
    found = build_pairs(list(originals), [kind], 10, 0)
    return [pair for pair in found if pair.source == originals[0].source]


@pytest.mark.parametrize(("row", "said"), [
    ({**GOOD, "prompt": ""}, "prompt = '': String should have at least 1"), ({**GOOD, "chosen": ""}, "chosen = '': String"),
    ({**GOOD, "rejected": 5}, "rejected = 5: Input should be a valid string"), ({**GOOD, "source": None}, "source = None: "),
    ({**GOOD, "score": 1}, "score = 1: Extra inputs"), ({"prompt": "p", "chosen": "c", "source": "s"}, "rejected: Field req"),
    ({**GOOD, "source": ""}, "source = '': String should .*a pair has prompt"), ("[1]", "valid dictionary"), ("{", "not JSON")])
def test_a_broken_row_is_refused_by_file_line_and_field(tmp_path, row, said):
    path = _file(tmp_path, GOOD, "", row, GOOD)
    with pytest.raises(DataError, match=rf"{re.escape(path)}, line 3: .*{said}"):
        load_pairs(path)


@pytest.mark.parametrize("rows", [(), ("",)])
def test_a_file_without_pairs_is_refused(tmp_path, rows):
    with pytest.raises(DataError, match="holds no preference pair"):
        load_pairs(_file(tmp_path, *rows))
    with pytest.raises(DataError, match=r"/no/such\.jsonl"):
        load_pairs("/no/such.jsonl")


def test_pairs_of_a_file_keep_their_order_and_are_human_unless_they_say(tmp_path):
    rows = [GOOD, {**GOOD, "kind": "filler", "rejected": "", "chosen": "一篇好文章。"}]
    one, other = load_pairs(_file(tmp_path, *rows))
    assert (one.kind, one.language, one.chosen) == ("human", "en", "A good text.")
    assert (other.kind, other.language, other.rejected) == ("filler", "zh", "")


ITEMS = st.lists(st.sampled_from("abcdefghijkl").map(lambda s: Original(s, "p", "t", True)), max_size=40)


@given(ITEMS, st.floats(0.01, 0.99), st.integers(0, 99))
def test_split_never_puts_one_source_on_both_sides(items, share, seed):
    train, heldout = split_by_source(items, share, seed)
    sides = [{item.source for item in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == round(len(sides[0] | sides[1]) * share)
    assert Counter(item.source for item in items) == Counter(item.source for item in train + heldout)
    assert split_by_source(items[::-1], share, seed) == (train[::-1], heldout[::-1])


def test_the_seed_decides_the_split():
    items = [Original(f"s{n}", "p", "t", True) for n in range(12)]
    assert len({tuple(o.source for o in split_by_source(items, 0.25, seed)[1]) for seed in range(20)}) > 10


COUNTS = st.tuples(st.integers(1, 6), st.integers(0, 6), st.sampled_from("ab"))


@given(st.lists(COUNTS, max_size=30), st.integers(0, 99))
def test_as_many_chosen_texts_are_longer_as_are_shorter(counts, seed):
    made = [Pair(prompt="p", chosen="word " * a, rejected="word " * b, source=str(i), kind=kind)
            for i, (a, b, kind) in enumerate(counts)]
    kept = balance_lengths(made, seed)
    assert kept == balance_lengths(made, seed)
    assert [int(p.source) for p in kept] == sorted({int(p.source) for p in kept}), "in their order, each once"
    before, after = (Counter(int(np.sign(len(p.chosen) - len(p.rejected))) for p in some) for some in (made, kept))
    assert after[1] == after[-1] == min(before[1], before[-1]), "and no more is dropped than that takes"
    assert after[0] == before[0]


def test_balancing_drops_from_each_kind_in_proportion():
    longer = [Pair(prompt="p", chosen="a b", rejected="a", source="s", kind=kind) for kind in "aaab" * 200]
    shorter = [Pair(prompt="p", chosen="a", rejected="a b", source="s", kind="c")] * 400
    kinds = Counter(p.kind for p in balance_lengths(longer + shorter, 0))
    assert kinds["a"] + kinds["b"] == 400 == kinds["c"]
    assert 275 < kinds["a"] < 325


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(KINDS), unique=True, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_build_makes_the_kinds_asked_for_and_no_more_of_each_than_asked(kinds, per_kind, seed):
    made = build_pairs(MIXED, kinds, per_kind, seed)
    assert list(dict.fromkeys(p.kind for p in made)) == kinds
    assert set(Counter(p.kind for p in made).values()) <= {per_kind}, "there are more than enough originals"
    assert all(p.chosen != p.rejected for p in made)
    assert len({(p.kind, p.chosen) for p in made}) == len(made), "an original gives one pair a kind"
    sources = {original.source for original in MIXED}
    assert all(p.source in sources and has_han(p.prompt) <= has_han(p.chosen) for p in made)
    assert build_pairs(MIXED, kinds, per_kind, seed) == made


def test_the_seed_decides_which_pairs_are_built():
    assert build_pairs(MIXED, KINDS, 5, 1) != build_pairs(MIXED, KINDS, 5, 2)
    assert len({tuple(p.source for p in build_pairs(MIXED, ["human_model"], 2, seed)) for seed in range(9)}) > 3


def test_every_process_makes_the_same_pairs():
    code = ("import test_pairs as t; train, heldout = t.split_by_source(t.MIXED, 0.3, 0)\n"
            "print(*t.build_pairs(train, t.KINDS, 5, 0), *t.build_pairs(heldout, t.KINDS, 5, 0), sep='\\n')")
    made = [subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=os.environ | {"PYTHONHASHSEED": seed},
                           capture_output=True, text=True, check=True).stdout for seed in ("1", "2")]
    assert made[0] == made[1] and made[0].count("kind=") > 50


def test_no_more_pairs_are_built_than_there_are_originals():
    made = build_pairs(_originals(2, 1), KINDS, 100, 0)
    counts = Counter(p.kind for p in made)
    assert counts == dict.fromkeys(DAMAGES, 6) | {"human_model": 4, "requirement": 2}


@pytest.mark.parametrize("kind", sorted(DAMAGES))
def test_a_damaged_pair_prefers_the_original_in_the_same_layout(kind):
    by_text = {plain(o.text): o for o in MIXED}
    made = build_pairs(MIXED, [kind], 100, 0)
    assert len(made) == len(MIXED)
    for pair in made:
        original = by_text[pair.chosen]
        assert (pair.source, pair.prompt) == (original.source, original.prompt)


def test_human_and_model_written_originals_take_turns():
    for per_kind in (2, 4, 6):
        made = build_pairs(MIXED, ["shuffled"], per_kind, 3)
        assert sum(p.source.startswith("book/") for p in made) == per_kind / 2


@pytest.mark.parametrize("seed", range(5))
def test_off_topic_is_never_a_text_of_its_own_source(seed):
    for chinese in (False, True):  # by language: the sources of both have the same names
        some = [o for o in MIXED if has_han(o.text) == chinese]
        own = {o.source: set.union(*(_words(p.text) for p in some if p.source == o.source)) for o in some}
        made = build_pairs(MIXED, ["off_topic"], 100, seed)
        for pair in (p for p in made if has_han(p.chosen) == chinese):
            assert has_han(pair.rejected) == chinese
            assert any(_words(pair.rejected) <= theirs for source, theirs in own.items() if source != pair.source)
            assert len(_words(pair.rejected) & own[pair.source]) <= 2 * chinese, "Han characters may come in two sources"


@pytest.mark.parametrize("chinese", [False, True])
def test_the_requirement_is_met_by_the_chosen_text_alone(chinese):
    originals = _originals(2, 8, chinese)
    by_text = {original.text: original for original in originals}
    made = build_pairs(originals, ["requirement"], 100, 0)
    assert len(made) == 16
    for pair in made:
        original = by_text[pair.chosen]
        assert not original.human and pair.rejected == original.alternative
        asked = pair.prompt.removeprefix(original.prompt)
        word = re.fullmatch(r"文中须提到“(\w\w)”。" if chinese else r" Mention the word (\w{6,})\.", asked)[1]
        assert word in pair.chosen and word not in pair.rejected and word not in original.prompt


@pytest.mark.parametrize("alternative", ["The bridges alone.", "The footbridges alone.", "A bridgeseat."])
def test_a_word_that_both_texts_or_the_prompt_have_is_no_requirement(alternative):
    written = Original("q1", "Write about gardens.", "The gardens and bridges.", False, alternative)
    assert _one("requirement", written, Original("q2", "p", "Some other text.", False)) == []


def test_a_word_that_the_alternative_has_in_capitals_is_no_requirement():
    written = Original("q1", "Write.", "The old gardens.", False, "Gardens are old.")
    assert _one("requirement", written, Original("q2", "p", "Some other text.", False)) == []


def test_a_human_text_beats_the_models_own_and_nothing_else_does():
    made = build_pairs(MIXED, ["human_model"], 100, 0)
    by_text = {" ".join(o.text.split()): o for o in MIXED}
    assert len(made) == sum(o.human for o in MIXED)
    assert all(by_text[p.chosen].human and p.rejected == by_text[p.chosen].alternative for p in made)
    silent = Original("book", "p", "The model had nothing to say.", True, "")
    copied = Original("book", "p", "The same text.", True, "The same text.")
    assert _one("human_model", silent, MIXED[0]) == _one("human_model", copied, MIXED[0]) == []
    assert len(_one("human_model", Original("book", "p", "A text.\n\nOf people.", True, "A model's text."), MIXED[0])) == 1


@pytest.mark.parametrize("kind", sorted(DAMAGES))
@pytest.mark.parametrize("text", ["One sentence. Another.", "The same. The same. The same. The other. The same.", "a heading"])
def test_a_text_too_short_to_damage_is_skipped(text, kind):
    short, long = Original("short", "p", text, True), Original("long", "p", _text("long"), True)
    assert build_pairs([short, long], [kind], 10, 0) == []  # neither damaged nor taken to damage with


def test_human_originals_continue_the_passage_before(tmp_path):
    paragraphs = [_text(f"paragraph {n}", sentences=3) for n in range(12)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = human_originals([str(tmp_path / "book.txt")], 20, 100, 0)
    assert {o.text for o in found} == set(paragraphs[1:]), "the first has nothing before it"
    assert {(o.source, o.human, o.alternative) for o in found} == {(f"{tmp_path}/book.txt/book", True, "")}
    for original in found:
        before = paragraphs[paragraphs.index(original.text) - 1]
        assert original.prompt == "Continue this text.\n\n" + " ".join(before.split()[-40:])
    few = human_originals([str(tmp_path / "book.txt")] * 2, 20, 4, 0)
    assert len(few) == 8 and set(few) <= set(found), "at most so many of each corpus"
    assert few == human_originals([str(tmp_path / "book.txt")] * 2, 20, 4, 0)


def test_chinese_originals_are_asked_for_in_chinese(tmp_path):
    paragraphs = [_text(f"段 {n}", chinese=True) for n in range(3)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = human_originals([str(tmp_path / "book.txt")], 40, 9, 0)
    assert sorted(o.prompt for o in found) == sorted(f"请续写下文。\n\n{p[-80:]}" for p in paragraphs[:2])


def test_the_card_counts_what_there_is():
    parts = {"train": build_pairs(MIXED, KINDS, 7, 0), "heldout": build_pairs(MIXED, ["filler", "truncated"], 5, 1)}
    card = data_card(parts)
    assert list(zip(card.split, card.kind, strict=True)) == (
        [("train", kind) for kind in KINDS] + [("heldout", "filler"), ("heldout", "truncated")])
    for row in card.itertuples():
        own = [p for p in parts[row.split] if p.kind == row.kind]
        assert (row.pairs, row.sources) == (len(own), len({p.source for p in own}))
        chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in p.chosen) for p in own)
        assert row.languages == " ".join(f"{k}:{n}" for k, n in (("en", len(own) - chinese), ("zh", chinese)) if n)
        longer = sum(count_words(p.chosen) > count_words(p.rejected) for p in own)
        assert row.chosen_longer == pytest.approx(longer / len(own))
        middle = sorted(count_words(p.rejected) for p in own)
        assert row.rejected_words == (middle[(len(own) - 1) // 2] + middle[len(own) // 2]) / 2
    assert card.chosen_longer[card.kind == "truncated"].eq(1).all()


@pytest.mark.parametrize(("chosen", "rejected", "fold_layout", "said"), [
    ("One.\n\nTwo.", "One.\n\nTwo.", False, r"line 2: chosen and rejected are the same: leave"),
    ("One.\n\nTwo.", "One. Two.", True, r"line 2: chosen and rejected are the same but for white space.*fold_layout"),
    ("One.\n\nTwo.", "One. Two.", False, ""), ("One.", "Two.", True, "")])
def test_a_pair_of_equal_texts_is_refused_at_its_line(tmp_path, chosen, rejected, fold_layout, said):
    good = {"prompt": "p", "chosen": "A", "rejected": "B", "source": "s"}
    write_rows(tmp_path / "pairs.jsonl", [good, good | {"chosen": chosen, "rejected": rejected}])
    if said:
        with pytest.raises(DataError, match=said):
            load_pairs(str(tmp_path / "pairs.jsonl"), fold_layout)
    else:
        assert len(load_pairs(str(tmp_path / "pairs.jsonl"), fold_layout)) == 2


LITBENCH = [{"prompt": f"[WP] Prompt {n // 2}", "chosen_story": f"Story {n} that was liked.",
             "rejected_story": f"Story {n}, less so.",
             "chosen_upvotes": 50, "rejected_upvotes": 20} for n in range(4)]
BENCH = {"prompt": "写一个故事。", "chosen": {"text": "很久以前，下着雨。", "score": 3, "length": 9}, "language": "zh",
          "genre": "fiction",
          "rejected": {"text": "有一天，出了太阳。", "score": 1, "length": 9}, "metadata": {"score_gap": 2}}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_litbench_is_read_in_its_own_columns(tmp_path, ending):
    path, table = tmp_path / f"litbench.{ending}", pd.DataFrame(LITBENCH)
    write = {"jsonl": partial(table.to_json, orient="records", lines=True),
             "parquet": table.to_parquet, "csv": partial(table.to_csv, index=False)}
    write[ending](path)
    pairs = load_pairs(str(path))
    assert [(p.prompt, p.chosen, p.rejected, p.kind) for p in pairs] == [
        (row["prompt"], row["chosen_story"], row["rejected_story"], "litbench") for row in LITBENCH]
    train, heldout = split_by_source(pairs, 0.5, 0)
    assert len({p.source for p in pairs}) == 2 and not {p.prompt for p in train} & {p.prompt for p in heldout}


def test_writing_preference_bench_is_read_in_its_own_columns(tmp_path):
    (pair,) = load_pairs(_file(tmp_path, BENCH))
    texts = tuple(BENCH[side]["text"] for side in ("chosen", "rejected"))
    assert (pair.chosen, pair.rejected, pair.kind, pair.language) == (*texts, "fiction", "zh")


def test_what_a_public_dataset_lost_is_left_out_and_counted(tmp_path, capsys):
    lost = [LITBENCH[0] | {"rejected_story": "[removed]"}, LITBENCH[1] | {"rejected_story": LITBENCH[1]["chosen_story"]}]
    assert len(load_pairs(_file(tmp_path, *lost, LITBENCH[2]))) == 1
    assert "2 pairs are left out" in capsys.readouterr().out


def test_a_release_of_ids_without_texts_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 1.*chosen.*LitBench or WritingPreferenceBench with its texts"):
        load_pairs(_file(tmp_path, {"prompt": "[WP] Rain", "chosen_comment_id": "abc", "rejected_comment_id": "def"}))


def test_a_table_that_cannot_be_read_is_refused_by_its_name(tmp_path):
    (tmp_path / "broken.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"cannot load .*broken\.parquet"):
        load_pairs(str(tmp_path / "broken.parquet"))
