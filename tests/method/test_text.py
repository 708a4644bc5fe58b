"""Words against an independent count, and the `<think>`/`<answer>` form on every kind of text."""

import random
import time
import timeit
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwzlib.method import text
from lwzlib.method.prompts import wrap
from lwzlib.method.text import (
    answer_language,
    count_words,
    fold,
    has_han,
    language_of,
    normalise,
    parse,
    split_passages,
    split_words,
    whole_sentences,
)

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
FORM = {"think": TAGS, "direct": TAGS[2:]}
STYLES = st.sampled_from(["think", "direct"])

LETTERS = st.one_of(*(st.characters(min_codepoint=low, max_codepoint=high, exclude_categories=("Cn", "Cs"))
                      for low, high in [(0x20, 0x7E), (0xA0, 0x24F), (0x1E00, 0x1EFF), (0x4DB0, 0x4E10),
                                        (0x3000, 0x3020), (0xF900, 0xFAFF), (0x20000, 0x20020), (0xFF01, 0xFF20)]))
MIXED = st.text(st.one_of(LETTERS, st.sampled_from("aé 的字1,.。！\n'")), max_size=80)
LOOSE = st.text(max_size=20)  # any characters, and by chance parts of tags
JOINING = {"Ll", "Lu", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Cf"}
TAG_FREE = st.text(st.characters(exclude_characters="<"), max_size=40)
SOUP = st.lists(st.one_of(st.sampled_from(TAGS), LOOSE, st.sampled_from(["<", ">", "</", "think>", "\n", " "])),
                max_size=12).map("".join)


def _words(text):
    """Character by character, by Unicode names; other letters, marks and format characters do not end a run."""
    count, in_latin = 0, False
    for character in text:
        name = unicodedata.name(character, "")
        han = name.startswith(("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH"))
        latin = name.startswith("LATIN ") or name.endswith("ORDINAL INDICATOR")
        count += han or (latin and not in_latin)
        in_latin = latin or (in_latin and not han and unicodedata.category(character)[0:2] in JOINING)
    return count


@settings(deadline=None)
@given(MIXED)
def test_count_words_equals_a_count_by_unicode_names(text):
    assert count_words(text) == _words(text)


@pytest.mark.parametrize(("text", "words"), [
    ("", 0), ("1984, 3.14!", 0), ("don't", 2), ("naïve Ångström", 2), ("春天来了", 4), ("我用Python3写", 4), ("a1b", 2),
    ("5 × 3 ÷ 2", 0), ("𠀀㐀豈", 3), ("sp\u200bri\u00adng", 1), ("cafe\u0301s", 1), ("sрrіng", 1), ("Ｓprｉng", 1),
    ("\u200bspring \u200bcame", 2), ("весна λόγος", 0), ("春\u200b天来\ufe00了", 4), ("sp𝓇ing ﬁnd oﬃce", 3)])
def test_count_words_on_known_texts(text, words):
    assert count_words(text) == words


def test_no_letter_mark_control_or_format_character_of_unicode_cuts_a_word_in_two():
    joining = JOINING | {"Cc"}
    characters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in joining and not c.isspace()]
    assert [c for c in characters if not has_han(c) and count_words(f"a{c}b") != 1] == []


@pytest.mark.parametrize("run", ["ж", "\u200b", "aж", "ж 字"])
def test_the_count_stays_linear_on_endless_runs(run):
    """Four times the text in about four times the processor time; sixteen would be quadratic."""
    assert _count_s(run * 400_000) < 8 * _count_s(run * 100_000)


def _count_s(text):
    times = []
    for _ in range(3):
        began = time.process_time()
        count_words(text)
        times.append(time.process_time() - began)
    return min(times)


@pytest.mark.parametrize("copy", [
    "SPRING  came\tearly", "sp\u200bring c\u00adame e\u0301arly", "ѕрring сame eаrly", "Ｓpring ｃame early",
    "𝐬pring came ⓔarly", "\x00spring came early\ufeff", "\x00sprin\x08g came early"])
def test_fold_shows_what_a_copy_hides(copy):
    assert fold(copy) == "spring came early"


@pytest.mark.parametrize("text", ["", "\ud800", "весна", "春天来了，很早。", "a1b"])
def test_fold_keeps_different_texts_different(text):
    assert fold(text) != fold(text + "x")
    assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize(("text", "language"), [
    ("Explain the Dao (道) in 300 words", "en"), ("春天", "zh"), ("写一篇关于 GPU 的文章", "zh"), ("", "en"), ("1984", "en"),
    ("The 孔子 museum in 曲阜 is worth a whole day of any visitor's time", "en"), ("весна", "en")])
def test_the_language_of_a_text_is_that_of_most_of_it(text, language):
    assert language_of(text) == language


@given(st.text(st.sampled_from("春天来了。 "), max_size=20), st.lists(st.sampled_from(["rain", "bread"]), max_size=20))
def test_adding_words_of_a_language_never_turns_a_text_away_from_it(chinese, english):
    text = chinese + " ".join(english)
    if language_of(text) == "zh":
        assert language_of(text + "雨") == "zh"
    else:
        assert language_of(text + " rain") == "en"


@pytest.mark.parametrize(("request_text", "language"), [
    ("帮我用英文写一封求职信", "en"), ("请用英语回答：什么是雨？", "en"), ("写一篇关于英语教学的文章", "zh"),
    ("写一篇英文作文", "en"),
    ("Write a poem in Chinese about rain.", "zh"), ("Write about teaching.", "en"), ("翻译成英文：下雨了", "en"),
    ("Translate this English poem into Chinese", "zh"), ("Write about how physics is taught in Chinese schools.", "en"),
    ("Write a report on trends in Chinese cinema, about 800 words.", "en"), ("写一篇关于英语演讲技巧的文章", "zh"),
    ("Write an essay on China. The Chinese climbed in.", "en")])
def test_an_answer_is_in_the_language_that_its_request_names(request_text, language):
    assert answer_language(request_text) == language


def test_normalising_breaks_long_runs_of_marks_only():
    marks = "a" + "\u0301" * 40 + "\u0323" * 40
    assert unicodedata.normalize("NFC", "é" * 100) == normalise("NFC", "e\u0301" * 100)
    assert normalise("NFKD", marks).count("\u034f") == 2 and fold(marks) == "a"


@given(st.text(st.characters() | st.sampled_from("\u0301\u0323\u05b0\u3099é가")))
def test_fold_is_that_of_plain_normalisation(text):
    assert fold(text) == fold(unicodedata.normalize("NFD", text))


def test_folding_a_long_run_of_marks_takes_no_more_than_one_of_letters():
    """39 s at 125,000 marks before; ratios, since seconds differ from machine to machine."""
    half = 60_000
    marks, letters = "a" + "\u0301" * half + "\u0323" * half, "é" * 2 * half
    voiced = "a" + "\u0301\uff9e" * half  # letters that decompose to marks
    seconds = [min(timeit.repeat(lambda text=text: fold(text), number=1, repeat=3)) for text in (marks, voiced, letters)]
    assert max(seconds[:2]) < 5 * seconds[2]


def test_only_two_characters_that_are_no_marks_decompose_to_them():
    def hidden(character):
        return not unicodedata.category(character).startswith("M") and unicodedata.combining(
            unicodedata.normalize("NFKD", character)[0])
    assert [c for c in map(chr, range(0x110000)) if hidden(c)] == ["\uff9e", "\uff9f"]


def test_has_han_sees_one_character_among_many():
    assert has_han("a" * 1000 + "字")
    assert not has_han("a。１カ한")


@settings(deadline=None)
@given(SOUP, STYLES)
def test_parse_never_raises_and_returns_parts_of_the_text(text, style):
    parsed = parse(text, style)
    assert parsed.plan in text
    assert parsed.answer in text
    assert not any(tag in parsed.plan + "\n" + parsed.answer for tag in TAGS)


@settings(deadline=None)
@given(TAG_FREE, TAG_FREE, STYLES)
def test_what_wrap_builds_is_exact_and_comes_back(plan, answer, style):
    parsed = parse(wrap(plan, answer, style), style)
    assert parsed.exact
    assert parsed.answer == answer.strip()
    assert parsed.plan == (plan.strip() if style == "think" else "")


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(TAGS), st.sampled_from(["", " ", "\n", "text", "字"])), max_size=9), STYLES)
def test_exact_if_and_only_if_the_pieces_have_the_form(pieces, style):
    tags = [piece for piece in pieces if piece in TAGS]
    depth, clean = 0, True
    for piece in pieces:
        depth += (piece in ("<think>", "<answer>")) - (piece in ("</think>", "</answer>"))
        clean &= piece in TAGS or depth == 1 or not piece.strip()
    assert parse("".join(pieces), style).exact == (tags == FORM[style] and clean)


@pytest.mark.parametrize("broken", [
    "<think>a</think><think>b</think><answer>c</answer>", "<think>a<think>b</think></think><answer>c</answer>",
    "<think>a</think><answer>c</answer><answer>d</answer>", "<think>a<answer>c</answer></think>",
    "<answer>c</answer><think>a</think>", "<think>a</think><answer>c", "<think>a<answer>c</answer>",
    "<answer>c</answer>", "x <think>a</think><answer>c</answer>", "<think>a</think> x <answer>c</answer>",
    "<think>a</think><answer>c</answer> x", "<Think>a</Think><answer>c</answer>", "< think>a</think><answer>c</answer>",
    ""])
def test_nested_repeated_unclosed_reordered_or_surrounded_tags_are_not_exact(broken):
    assert not parse(broken, "think").exact


def test_the_direct_style_asks_for_an_answer_alone():
    assert parse("\n<answer>c</answer> ", "direct").exact
    assert not parse("<think>a</think><answer>c</answer>", "direct").exact
    assert not parse("Sure! <answer>c</answer>", "direct").exact


def test_a_truncated_answer_keeps_its_words():
    parsed = parse("<think>a plan</think>\n<answer>one two three", "think")
    assert (parsed.exact, parsed.plan, parsed.answer) == (False, "a plan", "one two three")


def test_a_text_without_tags_has_no_answer():
    assert parse("one two three", "direct").answer == ""


@pytest.mark.parametrize("alphabet", [[chr(i) for i in range(256)], ["<", ">", "/", "think", "answer", " "], TAGS])
def test_two_million_characters_of_noise_are_parsed(alphabet):
    noise = "".join(random.Random(0).choices(alphabet, k=2_000_000 // max(len(max(alphabet)), 1)))
    for style in FORM:
        assert not parse(noise, style).exact
        assert parse(wrap(noise.replace("<", ""), noise.replace("<", ""), style), style).exact


@settings(deadline=None)
@given(st.one_of(MIXED, st.lists(st.sampled_from(["word", "字", " ", ". ", "。\n", "”"]), max_size=300).map("".join)))
def test_split_passages_loses_no_word_and_hides_no_long_one(text):
    passages = split_passages(text)
    assert sum(map(count_words, passages)) == count_words(text)
    assert all(passage.strip() == passage != "" and count_words(passage) <= 40 for passage in passages)


@pytest.mark.parametrize("word", ["word ", "字"])
def test_a_sentence_without_a_stop_is_cut_every_40_words(word):
    assert [count_words(passage) for passage in split_passages(word * 100)] == [40, 40, 20]


def test_split_passages_cuts_after_stops_in_both_languages():
    assert split_passages("One. Two!\n“三。”四？") == ["One.", "Two!", "“三。”", "四？"]


def test_whole_sentences_leaves_a_cut_sentence_out():
    assert whole_sentences("One  day.\nIt was") == "One day."
    assert whole_sentences("It  was") == "It was"


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_the_general_rule(ascii_text):
    assert split_words(ascii_text) == text._WORD.findall(ascii_text)


def test_every_ascii_character_between_two_letters_is_taken_as_the_general_rule_takes_it():
    for character in map(chr, range(128)):
        assert split_words(f"a{character}b") == text._WORD.findall(f"a{character}b"), ascii(character)
