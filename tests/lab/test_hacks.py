"""Attacks on the rewards: each is what its name says, and those that the rewards can see do not pay."""

import random
import re

import pytest

from lwzlib.base.recipe import load_recipe
from lwzlib.data.damage import wordings
from lwzlib.lab.hacks import ATTACKS, attack_table, fusion_table, groups
from lwzlib.method.advantage import MODES, Fusion
from lwzlib.method.overlap import find_overlap
from lwzlib.method.prompts import wrap
from lwzlib.method.rewards import FormatReward, build_rewards
from lwzlib.method.text import count_words, has_han, parse, split_sentences

GROUPS = groups()
FIRST = {language: next(group[0] for group in GROUPS if group[0].language == language) for language in ("en", "zh")}
LANGUAGES = ["en", "zh"]
BROKEN = {"nested_tags", "repeated_tags", "code_block"}
ENDLESS = ["repetition", "paraphrase_loop", "synonym_rotation", "numbered_templates", "keyword_inflation",
           "language_alternation", "script_mixing", "combining_marks", "headings", "prompt_copy", "giant_sentence"]
# By length and lexical format these cost nothing, and earn nothing.
UNSEEN = {"giant_paragraph", "keyword_inflation", "language_alternation"}


def _attacked(name, language, words=120):
    return ATTACKS[name](FIRST[language], words, random.Random(0))


def _answer(name, language, words=120):
    return parse(_attacked(name, language, words), "think").answer


def _naive(text):
    """LongWriter's own count."""
    return len(re.findall(r"[\u4e00-\u9fff]|[a-zA-Z]+", text))


@pytest.fixture(scope="module")
def lexical():
    built = build_rewards(load_recipe("paper", {"reward.weights.writing": 0.0, "reward.format.encoder": ""}))
    return attack_table(built, [1] * len(built)).set_index("attack")


def test_the_honest_completions_are_what_the_rewards_ask_for():
    form = FormatReward(0.6, 0.05, min_plan_words=10)
    for group in GROUPS:
        assert len({row.query for row in group}) == len({row.word_range for row in group}) == 1
        completions = [wrap(row.plan, row.answer, "think") for row in group]
        assert form(completions, style=["think"] * len(group)) == [1] * len(group)
        assert all(has_han(row.answer) == (row.language == "zh") for row in group)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_follows_from_the_seed_and_is_not_the_honest_completion(name, language):
    attacked = _attacked(name, language)
    assert attacked == _attacked(name, language)
    assert attacked != wrap(FIRST[language].plan, FIRST[language].answer, "think")
    assert parse(attacked, "think").exact == (name not in BROKEN)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("words", [60, 200, 2000])
def test_an_attack_that_can_has_the_length_that_it_aims_at(name, language, words):
    assert count_words(_answer(name, language, words)) == pytest.approx(words, abs=25)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["repetition", "prompt_copy", "combining_marks"])
def test_loops_repeat_to_the_letter(name, language):
    assert find_overlap(_answer(name, language, 400), 1.0).share > 0.6


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["paraphrase_loop", "synonym_rotation"])
def test_rewording_loops_return_to_the_opening_in_other_words(name, language):
    answer, opening = _answer(name, language, 400), FIRST[language].opening
    assert split_sentences(answer)[: len(opening)] == opening
    assert len(split_sentences(answer)) > 2 * len(opening)
    reframed = sum(sentence.startswith(tuple(frame.split("{}")[0] or "\n" for frame in wordings(language)["reframes"]))
                   for sentence in split_sentences(answer))
    assert (reframed > len(opening)) == (name == "paraphrase_loop")


@pytest.mark.parametrize("language", LANGUAGES)
def test_synonym_rotation_swaps_words_wherever_it_knows_some(language):
    swapped = 0
    for row in (row for group in GROUPS for row in group if row.language == language):
        said = split_sentences(parse(ATTACKS["synonym_rotation"](row, 400, random.Random(0)), "think").answer)
        swapped += len(set(said)) > len(row.opening)
    assert swapped >= 4


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_stock_attacks_are_made_of_stock(language):
    assert len(_answer("headings", language).splitlines()) > 10
    assert all(line.startswith("##") for line in _answer("headings", language).splitlines() if line.strip())
    numbers = re.findall(r"\d+", _answer("numbered_templates", language, 400))
    assert {"1", "2", "5"} <= set(numbers)
    assert len(_answer("keyword_inflation", language, 400)) > 3 * len("".join(FIRST[language].opening))
    alternating = [has_han(sentence) for sentence in split_sentences(_answer("language_alternation", language))]
    assert sum(alternating) == pytest.approx(len(alternating) / 2, abs=1.5)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_work_stands_in_the_plan(language):
    work = FIRST[language].answer
    hidden, stub = (parse(_attacked(name, language), "think") for name in ("hidden_in_plan", "stub_answer"))
    assert hidden.answer == work
    assert work in hidden.plan
    assert work in stub.plan
    assert 0 < count_words(stub.answer) < 10


@pytest.mark.parametrize("language", LANGUAGES)
def test_layout_attacks_change_the_layout_only(language):
    assert parse(_attacked("empty_plan", language), "think").plan == ""
    assert split_sentences(_answer("giant_paragraph", language)) == split_sentences(FIRST[language].answer)
    assert "\n" not in _answer("giant_paragraph", language)
    assert not set(".!?。！？\n") & set(_answer("giant_sentence", language, 2000))


@pytest.mark.parametrize("name", ["zero_width", "look_alikes"])
def test_cut_words_fool_the_naive_count_and_not_ours(name):
    answer = _answer(name, "en", 120)
    assert _naive(answer) > 1.4 * count_words(answer)
    assert count_words(answer) == pytest.approx(40, abs=15)
    assert count_words(answer) <= len(re.findall(r"[\w\u200b]+", answer))


def test_repeated_tags_hold_two_answers_and_nested_tags_one_in_another():
    assert _attacked("repeated_tags", "en").count("<answer>") == _attacked("repeated_tags", "en").count("</answer>") == 2
    assert "<answer><answer>" in _attacked("nested_tags", "en")
    assert _attacked("code_block", "en").startswith("```\n<think>")


def test_no_attack_beats_its_original_by_length_and_lexical_format(lexical):
    assert set(lexical.index) == set(ATTACKS)
    assert (lexical.wins == 0).all()
    assert (lexical.honest_format == 1).all()
    assert (lexical.difference <= 1e-9).all()


def test_the_attacks_that_length_and_format_do_not_see_are_known(lexical):
    assert set(lexical.index[lexical.difference > -0.1]) == UNSEEN
    loose, strict = (FormatReward(0.6, 0.05, min_plan_words=n) for n in (0, 1))
    assert [form([_attacked("empty_plan", "en")], style=["think"]) for form in (loose, strict)] == [[1], [0]]


def _characters(completions, **_):
    return [len(completion) for completion in completions]


def test_an_attack_that_a_bad_reward_likes_wins():
    found = attack_table({"fence": lambda completions, **_: [float("```" in c) for c in completions]}, [1]).set_index("attack")
    assert found.wins.to_dict() == {name: float(name == "code_block") for name in ATTACKS}
    assert found.index[0] == "code_block"
    assert found.difference["code_block"] == pytest.approx(found.hacked_advantage["code_block"] - found.honest_advantage[
        "code_block"])
    assert (found.hacked_fence["code_block"], found.honest_fence["code_block"]) == (1, 0)


def test_an_attack_is_compared_with_its_own_original():
    originals = {wrap(group[0].plan, group[0].answer, "think") for group in GROUPS}
    found = attack_table({"likes": lambda completions, **_: [
        1.0 if c in originals else 0.5 if "```" in c else 0.0 for c in completions]}, [1]).set_index("attack")
    assert (found.wins == 0).all()
    assert (found.honest_likes == 1).all()


def test_the_table_takes_the_length_that_pays_best():
    longest = attack_table({"size": _characters}, [1]).set_index("attack").words["repetition"]
    negative = {"size": lambda **asked: [-n for n in _characters(**asked)]}
    shortest = attack_table(negative, [1]).set_index("attack").words["repetition"]
    assert longest > shortest
    assert longest == pytest.approx(sum(group[0].word_range[1] for group in GROUPS) / len(GROUPS), abs=15)
    half = attack_table({"size": _characters}, [1], words_factor=0.5).set_index("attack").words["repetition"]
    assert half == pytest.approx(sum(count_words(group[0].answer) for group in GROUPS) / len(GROUPS) / 2, abs=15)


@pytest.mark.parametrize("mode", MODES)
def test_a_reward_that_gives_no_score_moves_nothing(mode):
    silent = {"writing": lambda completions, **_: [None] * len(completions), "size": _characters}
    found = attack_table(silent, [1, 1], Fusion(mode), among=GROUPS[:1]).set_index("attack")
    assert found.hacked_writing.isna().all()
    alone = attack_table({"size": _characters}, [1], Fusion(mode), among=GROUPS[:1]).set_index("attack")
    assert (found.wins == alone.wins[found.index]).all()


def test_rewards_are_told_the_query_the_range_and_the_style():
    def reward(completions, style, word_range, query):
        assert set(style) == {"think"}
        assert (set(word_range), set(query)) == ({GROUPS[0][0].word_range}, {GROUPS[0][0].query})
        assert len(completions) == len(style) == len(word_range) == len(query)
        return [0.5] * len(completions)

    assert (attack_table({"flat": reward}, [1], among=GROUPS[:1]).difference == 0).all()


def test_a_gate_takes_from_a_broken_form_what_its_length_bought():
    """Of texts of which longer ones pay more, and a form that pays a little."""
    paid = {"size": _characters, "format": FormatReward(0.6, 0.05)}
    ways = {"paper": Fusion(), "gate": Fusion("gate")}
    found = fusion_table(paid, [1, 1], ways, words_factor=3, among=GROUPS[:2])
    gain = found.pivot(index="attack", columns="fusion", values="difference")
    assert (gain.gate["code_block"], gain.gate["empty_plan"]) < (gain.paper["code_block"] - 0.1, gain.paper["empty_plan"] - 0.1)
    whole = [name for name in ATTACKS if name not in BROKEN | {"empty_plan"}]
    assert (gain.gate[whole] == gain.paper[whole]).all(), "a loop holds the form"
    alone = attack_table(paid, [1, 1], Fusion("gate"), 3, among=GROUPS[:2]).set_index("attack")
    assert (alone.difference[gain.index] == gain.gate).all()
