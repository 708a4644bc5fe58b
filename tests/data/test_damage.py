"""Damaged texts: each differs in the way that its name says, keeps its length, and follows from the seed alone."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwzlib.data.damage import DAMAGES, endless, fill, join, plain, reword, wordings
from lwzlib.lab.hacks import groups
from lwzlib.method.overlap import find_overlap
from lwzlib.method.text import count_words, has_han, language_of, split_sentences

ANSWERS = {language: [row.answer for group in groups() for row in group if row.language == language]
           for language in ("en", "zh")}
NAMES, LANGUAGES, SEEDS = sorted(DAMAGES), ["en", "zh"], range(5)
WORDS = {"en": ["rain", "bell", "stone", "river", "lamp", "baker", "market", "train", "window", "harvest", "salt", "winter"],
         "zh": list("雨钟石河灯市信车窗田园盐桥冬钱山海风")}


def _damaged(name, language, seed, place=0):
    texts = ANSWERS[language]
    return DAMAGES[name](texts[place], random.Random(seed), texts[-1])


@st.composite
def _texts(draw):
    """3 to 12 different sentences of 8 to 30 words, in one to three paragraphs."""
    language = draw(st.sampled_from(LANGUAGES))
    words = st.lists(st.sampled_from(WORDS[language]), min_size=8, max_size=30)
    drawn = draw(st.lists(words, min_size=3, max_size=12, unique_by=tuple))
    if language == "en":
        sentences = [" ".join(each).capitalize() + ". " for each in drawn]
    else:
        sentences = ["".join(each) + "。" for each in drawn]
    breaks = draw(st.sets(st.integers(1, len(sentences) - 1), max_size=2))
    return "".join(("\n\n" if i in breaks else "") + sentence for i, sentence in enumerate(sentences))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NAMES)
def test_every_damage_to_the_honest_texts_differs_and_keeps_the_length(name, language):
    for place, text in enumerate(ANSWERS[language][:-1]):
        damaged = _damaged(name, language, place, place)
        assert damaged.split() != text.split()
        low, high = (0.05, 0.75) if name == "truncated" else (0.6, 1.6)
        assert low <= count_words(damaged) / count_words(text) <= high


@settings(deadline=None)
@given(_texts(), st.sampled_from(NAMES), st.integers(0, 99))
def test_every_damage_to_any_text_differs_and_keeps_the_length(text, name, seed):
    other = ANSWERS[language_of(text)][0]
    damaged = DAMAGES[name](text, random.Random(seed), other)
    assert "".join(damaged.split()) != "".join(text.split())
    assert damaged == DAMAGES[name](text, random.Random(seed), other)
    if name != "truncated":
        assert 0.6 <= count_words(damaged) / count_words(text) <= 1.6


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"off_topic"}))  # there the other text decides
def test_the_seed_decides(name, language):
    assert len({_damaged(name, language, seed) for seed in range(20)}) > 1
    assert _damaged(name, language, 3) == _damaged(name, language, 3)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"truncated"}))
def test_paragraphs_stay_as_many(name, language):
    for seed in SEEDS:
        assert _damaged(name, language, seed).count("\n\n") == ANSWERS[language][0].count("\n\n")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_shuffled_keeps_every_sentence(language, seed):
    before, after = (split_sentences(text) for text in (ANSWERS[language][0], _damaged("shuffled", language, seed)))
    assert before != after
    assert Counter(before) == Counter(after)


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_differs_when_nearly_all_sentences_are_the_same(seed):
    assert split_sentences(DAMAGES["shuffled"]("A bell. A bell. A coin.", random.Random(seed), "")) != [
        "A bell.", "A bell.", "A coin."]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_repeated_says_nothing_new_and_something_twice(language, seed):
    text, damaged = ANSWERS[language][0], _damaged("repeated", language, seed)
    assert set(split_sentences(damaged)) < set(split_sentences(text))
    assert find_overlap(text, 0.6).share == 0
    assert find_overlap(damaged, 0.99).share > 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_repeated_repeats_a_good_share(language):
    texts = [DAMAGES["repeated"](text, random.Random(seed), "") for text in ANSWERS[language] for seed in range(5)]
    assert 0.3 < sum(find_overlap(text, 0.99).share for text in texts) / len(texts) < 0.65


@pytest.mark.parametrize("name", ["repeated", "padded"])
def test_one_very_long_sentence_makes_way_for_others(name):
    text = "A bell rang. " + "stone " * 35 + "fell. The winter came."
    damaged = DAMAGES[name](text, random.Random(0), "")
    assert "stone" not in damaged
    assert 0.8 <= count_words(damaged) / count_words(text) <= 1.2


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["filler", "language_switched"])
def test_what_replaces_stands_where_something_was_lost(name, language):
    original = set(split_sentences(ANSWERS[language][0]))
    last = [split_sentences(_damaged(name, language, seed))[-1] in original for seed in range(20)]
    assert 2 <= sum(last) <= 18


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_padded_follows_each_sentence_with_another_wording_of_it(language, seed):
    original, said = split_sentences(ANSWERS[language][0]), split_sentences(_damaged("padded", language, seed))
    kept = [sentence for sentence in said if sentence in original]
    assert len(said) / 2 <= len(kept) <= len(said) / 2 + 1
    assert said[0] in kept
    assert said[1] not in original
    assert len(kept) < len(original)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", range(20))
def test_truncated_is_a_beginning_that_ends_within_a_sentence(language, seed):
    text, damaged = ANSWERS[language][0], _damaged("truncated", language, seed)
    assert text.startswith(damaged)
    assert 0.09 <= len(damaged) / len(text) <= 0.7
    assert damaged[-1] not in ".!?。！？\n "
    assert text[len(damaged)] not in ".!?。！？\n"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_stuffed_is_the_text_and_keywords(language, seed):
    text, damaged = ANSWERS[language][0], _damaged("stuffed", language, seed)
    keywords = "|".join(map(re.escape, sorted(wordings(language)["keywords"], key=len, reverse=True)))
    rest, found = re.subn(rf"(?:{keywords})(?:, |，)", "", damaged)
    assert found >= 3
    assert rest == text


@pytest.mark.parametrize("language", LANGUAGES)
def test_off_topic_is_the_other_text(language):
    assert set(split_sentences(_damaged("off_topic", language, 0))) <= set(split_sentences(ANSWERS[language][-1]))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_language_switched_has_a_stretch_of_the_other_language(language, seed):
    original, sentences = split_sentences(ANSWERS[language][0]), split_sentences(_damaged("language_switched", language, seed))
    foreign = [i for i, sentence in enumerate(sentences) if has_han(sentence) == (language == "en")]
    assert foreign
    assert foreign == list(range(foreign[0], foreign[-1] + 1))
    assert all(sentence in original for i, sentence in enumerate(sentences) if i not in foreign)
    assert 0.25 < (len(sentences) - len(foreign)) / len(original) < 0.75


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_filler_takes_the_place_of_a_share_and_the_rest_stays_in_order(language, seed):
    original, sentences = split_sentences(ANSWERS[language][0]), split_sentences(_damaged("filler", language, seed))
    stock = " ".join(wordings(language)["filler"])
    kept = [sentence for sentence in sentences if sentence in original]
    assert kept == [sentence for sentence in original if sentence in kept]
    assert all(sentence in stock for sentence in sentences if sentence not in original)
    assert 0.25 < len(kept) / len(original) < 0.75


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("group", range(5))
def test_reword_swaps_synonyms_and_puts_openings_on(language, group):
    words = wordings(language)["synonyms"][group]
    stop = {"en": " it is.", "zh": "。"}[language]
    for word in words:
        plain = reword(word.capitalize() + stop, random.Random(0), language, reframe=False)
        assert plain.removesuffix(stop).lower() in {each.lower() for each in words if each != word}
        assert plain[0] == plain[0].upper()
    sentence = ANSWERS[language][0].split("\n")[0]
    assert reword(sentence, random.Random(0), language) != reword(sentence, random.Random(0), language, reframe=False)


def test_reword_leaves_parts_of_words_and_the_pronoun_alone():
    frames = wordings("en")["reframes"]
    reworded = {reword("I q9x.", random.Random(seed), "en") for seed in range(20)}
    assert reworded <= {frame.format("I q9x.") for frame in frames}
    word = wordings("en")["synonyms"][0][0]
    assert f"q{word}q" in reword(f"It q{word}q.", random.Random(0), "en", reframe=False)


@settings(deadline=None)
@given(_texts(), st.sampled_from(NAMES), st.integers(0, 99))
def test_layout_does_not_tell_a_damaged_text_from_the_plain_original(text, name, seed):
    original = plain(text)
    assert split_sentences(original) == split_sentences(text)
    damaged = DAMAGES[name](original, random.Random(seed), ANSWERS[language_of(text)][0])
    assert plain(damaged) == damaged or name in ("truncated", "stuffed")


def test_plain_keeps_paragraphs_and_the_breaks_of_lines_without_a_stop():
    assert plain("One.\nTwo.\n \nThree is,\nhere.") == "One. Two.\n\nThree is,\nhere."


def test_join_puts_spaces_between_english_sentences_and_keeps_lines_without_a_stop():
    assert join(["One.", "Two.", "三。", "四。"]) == "One. Two. 三。四。"
    assert join(["## Title", "“One.”", "诗句", "诗句，", "“三。”", "四。"]) == "## Title\n“One.” 诗句\n诗句，\n“三。”四。"


@given(st.lists(st.integers(1, 20), min_size=1), st.integers(0, 200), st.integers(0, 9))
def test_fill_stops_as_near_as_it_gets(lengths, words, seed):
    taken = fill(endless(["word " * n for n in lengths], random.Random(seed)), words)
    total = sum(map(count_words, taken))
    assert len(taken) >= 1
    assert abs(total - words) <= max(lengths) / 2 or len(taken) == 1
