"""Repeated passages: copies and near copies are found, honest text is not, and reports stand up to Jaccard."""

import dataclasses
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwzlib.base import near_duplicates
from lwzlib.base.kit import MINILM, is_prepared
from lwzlib.base.models import embed
from lwzlib.method import overlap
from lwzlib.method.overlap import Meaning, find_overlap, find_overlaps, first_alike, runs_of
from lwzlib.method.text import count_words, split_passages, split_sentences

NEAR = 0.6
HONEST = ("Rain taps on the awnings and runs to the gutters. An old woman buys a single lemon from a silent grocer. "
          "By evening the clouds have gone, and every crate is empty. Nobody remembers who painted the blue door. "
          "The first train leaves at six, long before the bakers wake.")
TOPICS = ("rain", "bread", "train", "river")
HONEST_ZH = ("雨点敲着雨棚，顺着檐角流进水沟。一位老太太停下来，只买了一个柠檬。"
             "傍晚云散了，街灯一盏盏亮起。没有人记得谁漆了那扇蓝门。")


def _jaccard(one, other):
    sets = []
    for passage in (one, other):
        folded = " ".join(passage.lower().split())
        size = 2 if any("\u4e00" <= c <= "\u9fff" for c in folded) else 5
        sets.append({folded[i : i + size] for i in range(max(len(folded) - size, 0) + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def _sentences(seed, chinese=False):
    """Random sentences; some are copies of earlier ones, some copies with words changed."""
    rng = random.Random(seed)
    words = ([chr(0x4E00 + i) for i in range(400)] if chinese else
             ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(150)])
    made = []
    for _ in range(60):
        kind = rng.random()
        sentence = list(rng.choice(made)) if made and kind < 0.5 else rng.choices(words, k=rng.randint(4, 30))
        if kind < 0.3:
            for _ in range(rng.randint(1, 4)):
                sentence[rng.randrange(len(sentence))] = rng.choice(words)
        made.append(sentence)
    joint, stop = ("", "。") if chinese else (" ", ".")
    return [joint.join(sentence) + stop for sentence in made]


def test_an_exact_repetition_is_found_with_its_first_place():
    found = find_overlap("Rain fell on the old town. Nobody came to the square. Rain fell on the old town.", NEAR)
    assert found.lexical == {2: 0}
    assert (sum(found.words), found.share) == (17, 6 / 17)


@pytest.mark.parametrize(("text", "changed"), [
    ("The committee will meet on Monday to discuss the budget for the coming year in the hall.", ("Monday", "Friday")),
    ("今年春天，村里的老人们决定重新修建河边那座已经荒废多年的石桥，让孩子们上学更方便。", ("春天", "秋天"))])
def test_a_copy_with_a_few_words_changed_is_found(text, changed):
    copy = text.replace(*changed)
    assert copy != text
    assert find_overlap(text + copy, NEAR).lexical == {1: 0}


@pytest.mark.parametrize("text", [HONEST, HONEST_ZH])
def test_honest_different_sentences_are_not_found(text):
    found = find_overlap(text, NEAR)
    assert len(found.passages) >= 4
    assert found.lexical == {}
    assert found.share == 0


@pytest.mark.parametrize("period", [1, 3, 7, 40, 61, 97])
def test_a_loop_of_ten_thousand_words_without_a_stop_is_found(period):
    rng = random.Random(period)
    loop = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(period)]
    found = find_overlap(" ".join((loop * 10_000)[:10_000]), NEAR)
    assert sum(found.words) == 10_000
    assert found.share > 0.9


@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_reports_equal_exact_jaccard_over_all_pairs(seed, chinese):
    sentences = _sentences(seed, chinese)
    found = find_overlap("".join(sentences) if chinese else " ".join(sentences), NEAR)
    assert found.passages == sentences
    assert all(j < i and _jaccard(sentences[i], sentences[j]) >= NEAR - 1e-9 for i, j in found.lexical.items())
    copies = {i for i, sentence in enumerate(sentences) if sentence in sentences[:i]}
    assert copies
    assert copies <= set(found.lexical)
    # two passages this close miss each other in every band once in 10,000 times; the hashes are fixed
    close = {i for i in range(60) for j in range(i) if j not in found.lexical and
             _jaccard(sentences[i], sentences[j]) >= 0.75}
    assert close <= set(found.lexical)


def test_a_lower_threshold_never_finds_less():
    text = " ".join(_sentences(3))
    shares = [find_overlap(text, near).share for near in (1.0, 0.8, 0.6, 0.4)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_passages_of_the_plan_have_negative_places():
    first, second = HONEST.split(". ")[:2]
    found = find_overlap(f"Something of its own comes first. {second}. {first}.", NEAR, against=f"{first}. {second}.")
    assert found.lexical == {1: -1, 2: -2}
    assert len(found.passages) == 3


def test_what_the_plan_alone_repeats_does_not_count():
    found = find_overlap(HONEST, NEAR, against="Think again about the plan. " * 20)
    assert (found.lexical, found.share) == ({}, 0)


@pytest.mark.parametrize("text", ["", " \n\t ", "...", "。！？"])
def test_a_text_without_passages_has_no_overlap(text):
    found = find_overlap(text, NEAR, against=HONEST)
    assert (found.passages, found.lexical, found.share) == ([], {}, 0)


def test_case_and_white_space_do_not_hide_a_copy():
    assert find_overlap("The old bridge fell.\nTHE  OLD\tBRIDGE fell.", 1.0).lexical == {1: 0}


@pytest.mark.parametrize("text", [
    "\ud800", "a\udfff. b\ud800. a\udfff.", "\x00\x01.\x00\x01.", "\u202e\ufeff\u2028. 𝕏."])
def test_lone_surrogates_and_control_characters_do_not_raise(text):
    assert 0 <= find_overlap(text, NEAR, against=text).share <= 1


def test_the_same_odd_characters_twice_are_a_copy():
    assert find_overlap("a\udfff b. c d e f g. a\udfff b.", NEAR).lexical == {2: 0}


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from([". ", "。", "the rain fell", "下雨了"]))).map("".join),
       st.text(max_size=30), st.floats(0.1, 1))
def test_the_share_is_between_0_and_1_and_counts_the_duplicates(text, plan, near):
    found = find_overlap(text, near, against=plan)
    assert 0 <= found.share <= 1
    words = [max(count_words(passage), 1) for passage in found.passages]
    assert found.words == words
    assert found.share == sum(words[i] for i in found.lexical) / max(1, sum(words))


def _about(*topics, seed=0, sentences=4):
    """For each topic one run: sentences of 16 words that name it, no two of them alike in their letters."""
    rng = random.Random(f"{seed} {topics}")
    def sentence(topic):
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(15)]
        return f"{topic.capitalize()} {' '.join(words)}."
    return " ".join(sentence(topic) for topic in topics for _ in range(sentences))


def _topic(text):
    """The fake encoder: an axis for each topic, and one of its own for anything else."""
    axes = np.zeros((len(text), len(TOPICS) + len(text)), dtype=np.float32)
    for i, each in enumerate(text):
        named = [k for k, topic in enumerate(TOPICS) if topic in each.lower().split()]
        axes[i, named[0] if named else len(TOPICS) + i] = 1
    return axes


MEANING = Meaning(_topic, 0.9)


def _never(texts):
    pytest.fail(f"asked to encode {texts}")


def test_runs_are_of_about_60_words_and_a_short_rest_is_left_out():
    assert runs_of([16] * 7) == [range(0, 4), range(4, 7)], "48 words at the end are enough"
    assert runs_of([16] * 5) == [range(0, 4)], "16 are not"
    assert runs_of([40, 40, 20]) == [range(0, 2), range(2, 3)]
    assert runs_of([300, 59, 1]) == [range(0, 1), range(1, 3)]
    assert runs_of([]) == runs_of([19]) == []


@given(st.lists(st.integers(1, 80), max_size=40))
def test_runs_cover_all_but_a_short_rest_in_order(words):
    runs = runs_of(words)
    covered = [i for run in runs for i in run]
    assert covered == list(range(len(covered)))
    assert sum(words[len(covered) :]) < 20
    assert all(sum(words[i] for i in run) >= 60 > sum(words[i] for i in run[:-1]) for run in runs[:-1])


def test_a_restated_run_is_found_and_the_first_of_a_kind_is_never_blamed():
    found = find_overlap(_about("rain", "bread", "rain", "train", "bread", "rain"), NEAR, meaning=MEANING)
    rain, bread = dict.fromkeys([*range(8, 12), *range(20, 24)], 0), dict.fromkeys(range(16, 20), 4)
    assert found.semantic == rain | bread
    assert (found.lexical, found.share) == ({}, 0.5)
    assert find_overlap(_about("rain", "bread", "train", "river"), NEAR, meaning=MEANING).semantic == {}


def test_a_cosine_below_the_threshold_is_no_repetition():
    def near(texts):
        return np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], dtype=np.float32)[: len(texts)]

    text = _about("rain", "bread", "train")
    assert find_overlap(text, NEAR, meaning=Meaning(near, 0.97)).semantic == {}
    assert set(find_overlap(text, NEAR, meaning=Meaning(near, 0.9)).semantic) == set(range(8, 12)), "0.96 with the second"
    assert set(find_overlap(text, NEAR, meaning=Meaning(near, 0.5)).semantic) == set(range(4, 12))


@pytest.mark.parametrize("text", ["", "A short text. It says little.", _about("rain")])
def test_a_text_of_one_run_is_not_encoded(text):
    assert find_overlap(text, NEAR, meaning=Meaning(_never, 0.9)).semantic == {}


def test_without_a_meaning_there_is_no_semantic_signal():
    assert find_overlap(_about("rain", "rain"), NEAR).semantic == {}


def test_the_plan_may_mean_what_the_text_means():
    assert find_overlap(_about("rain", "bread"), NEAR, _about("rain", "bread", seed=1), MEANING).share == 0


def test_chinese_runs_are_left_out_unless_the_encoder_reads_chinese():
    rng = random.Random(0)
    chinese = "".join("".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(16)) + "。" for _ in range(8))
    alike = Meaning(lambda texts: np.ones((len(texts), 1), dtype=np.float32), 0.9)
    assert find_overlap(chinese, NEAR, meaning=Meaning(_never, 0.9)).semantic == {}
    both = Meaning(alike.encode, 0.9, ("en", "zh"))
    assert find_overlap(chinese, NEAR, meaning=both).semantic == dict.fromkeys(range(4, 8), 0)
    mixed = chinese + _about("rain", "bread")
    assert set(find_overlap(mixed, NEAR, meaning=alike).semantic) == set(range(12, 16)), "the English runs alone"
    assert set(find_overlap(mixed, NEAR, meaning=both).semantic) == set(range(4, 16))


def _share_of(found, signal):
    """The share by one signal, as if the other had found nothing."""
    return dataclasses.replace(found, **{name: {} for name in ("lexical", "semantic") if name != signal}).share


def test_the_share_counts_words_of_either_signal_once():
    rain = _about("rain")
    text = f"{rain} {_about('bread')} {rain} {_about('bread', seed=1)}"
    found = find_overlap(text, NEAR, meaning=MEANING)
    assert found.lexical == {i: i - 8 for i in range(8, 12)}
    assert set(found.semantic) == set(range(8, 16))
    assert found.share == 0.5
    assert (_share_of(found, "lexical"), _share_of(found, "semantic")) == (0.25, 0.5)
    again = find_overlap(f"{text} {found.passages[0]}", NEAR, meaning=MEANING)  # too short a rest to be a run
    assert again.share == pytest.approx(144 / 272)
    assert _share_of(again, "lexical") == pytest.approx(80 / 272)


TEXTS = st.lists(st.sampled_from([*TOPICS, "plain"]), max_size=5).map(lambda topics: _about(*topics, seed=len(topics)))


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXTS, max_size=5))
def test_a_batch_of_texts_equals_one_at_a_time(texts):
    calls = []

    def encode(some):
        calls.append(some)
        return np.stack([np.eye(6, dtype=np.float32)[next((k for k, t in enumerate(TOPICS) if t in s.lower().split()), 5)]
                         for s in some])

    meaning = Meaning(encode, 0.9)
    found = find_overlaps(texts, NEAR, texts[::-1], meaning)
    assert len(calls) <= 1, "all runs are embedded in one call"
    assert found == [find_overlap(text, NEAR, plan, meaning) for text, plan in zip(texts, texts[::-1], strict=True)]


SIGNS = st.lists(st.sampled_from([-0.5, 0.5]), min_size=4, max_size=4)  # unit vectors with exact cosines


@pytest.mark.parametrize("most_earlier", [4096, 2])
@settings(deadline=None)
@given(st.lists(SIGNS, max_size=14), st.sampled_from([0.25, 0.5, 1.0]))
def test_first_alike_equals_brute_force(most_earlier, rows, same_meaning):
    expected, kept = {}, []
    for i, row in enumerate(rows):
        near = [j for j in kept[-most_earlier:] if sum(a * b for a, b in zip(row, rows[j], strict=True)) >= same_meaning]
        if near:
            expected[i] = near[0]
        else:
            kept.append(i)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_MOST_EARLIER", most_earlier)
        assert first_alike(np.array(rows, dtype=np.float32).reshape(-1, 4), same_meaning) == expected


@pytest.mark.parametrize("disguise", [
    lambda text: re.sub(r"(?<=\w)(?=\w)", "\u200b", text), lambda text: text.translate(str.maketrans("aeopcAT", "аеорсАТ")),
    lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in text),
    lambda text: re.sub(r"([aeiou])", "\\1\u0301", text), lambda text: text.replace("e", "\u00ade"), str.upper],
    ids=["zero width", "cyrillic", "full width", "accents", "soft hyphen", "capitals"])
def test_a_copy_in_disguise_is_found(disguise):
    hidden = disguise(HONEST)
    assert hidden != HONEST
    sentences = len(split_passages(HONEST))
    assert find_overlap(f"{HONEST} {hidden}", NEAR).lexical == {sentences + i: i for i in range(sentences)}


def test_the_kits_encoder_knows_a_restatement_from_another_subject():
    if not is_prepared(MINILM):
        pytest.skip("kit:minilm is not prepared (lwz prepare)")
    text = ("The town library will close for six weeks this summer while workers replace the roof. Readers may return their "
            "books at the school across the road, and loans made in June will not fall due until September. Until then the "
            "reading room is open on Saturdays, and the hour for children moves to the church hall next door to it.")
    other = ("Bread rises because yeast feeds on the sugar in flour and gives off bubbles of gas. The dough is elastic and "
             "traps them as it swells. In the oven the heat sets its walls into a light and open crumb, and a good crust "
             "forms where the air is hot and dry. A cold dough rises slowly, and many bakers like its flavour best.")
    restated = ("This summer the library of the town shuts for six weeks so that its roof can be replaced. Books may be "
                "returned at the school over the road, and what was lent in June is not due before September. Meanwhile one "
                "can use the reading room on Saturdays, and children meet in the hall of the church beside it.")
    vectors = embed([text, other, restated], MINILM)
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, 384))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    assert vectors[0] @ vectors[2] > 0.8 > 0.4 > vectors[0] @ vectors[1]
    meaning = Meaning(lambda texts: embed(texts, MINILM), 0.8)
    found = find_overlap(f"{text}\n\n{other}\n\n{restated}", NEAR, meaning=meaning)
    first = len(split_passages(text)) + len(split_passages(other))
    assert (found.lexical, found.semantic) == ({}, dict.fromkeys(range(first, len(found.passages)), 0))


def _sprinkled(text, every, other, start=0):
    words = text.split(" ")
    return " ".join(f"{word} {other}" if i % every == start else word for i, word in enumerate(words))


@given(st.integers(1, 30), st.integers(0, 9))
def test_characters_of_another_script_hide_no_repetition(every, seed):
    plain = find_overlap(_about("rain", "bread", "rain", "train", "bread", "rain", seed=seed), NEAR, meaning=MEANING)
    mixed = _sprinkled(_about("rain", "bread", "rain", "train", "bread", "rain", seed=seed), every, "水", start=every - 1)
    found = find_overlap(mixed, NEAR, meaning=MEANING)
    assert (found.semantic, found.lexical) == (plain.semantic, plain.lexical)
    english = _about("rain", seed=seed)
    assert find_overlap(english + " " + _sprinkled(english, every, "水"), NEAR).share > 0.4, "nor that of letters"


def test_words_of_another_script_hide_no_repetition_in_chinese():
    sentence = "春天的雨落在老城的屋顶上，孩子们撑着伞走过石桥，河水慢慢涨了起来。"
    assert find_overlap(sentence + "".join([*sentence[:9], "water", *sentence[9:20], "GPU", *sentence[20:]]), NEAR).share > 0.4


def test_chinese_sentences_between_english_ones_do_not_keep_these_from_the_encoder():
    english = split_sentences(_about("rain", "bread", "rain"))
    rng = random.Random(0)
    chinese = "".join("".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(16)) + "。" for _ in english)
    alternating = " ".join(one + " " + other for one, other in zip(english, split_sentences(chinese), strict=True))
    found = find_overlap(alternating, NEAR, meaning=MEANING)
    assert [found.passages[i] for i in found.semantic] == english[8:], "and Chinese is not blamed for what English repeats"


def test_alike_sentences_are_compared_with_a_bounded_number(monkeypatch):
    rng, base, compared = random.Random(0), [f"word{i}" for i in range(39)], []
    sentences = [" ".join(word if rng.random() > 0.3 else f"new{rng.randrange(10**9)}" for word in base) for _ in range(400)]
    signatures = near_duplicates._signatures

    def counted(passages):
        of, keys = signatures(passages)
        return lambda i: compared.append(i) or of(i), keys

    monkeypatch.setattr(near_duplicates, "_signatures", counted)
    find_overlap(". ".join(sentences), 0.9)
    assert 0 < len(compared) <= 400 * 4 * near_duplicates._MOST_COMPARED
