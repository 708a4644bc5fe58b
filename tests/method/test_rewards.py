"""Rewards: the published length formula, the form, repetition, and finite values in [0, 1] for every text."""

import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.method.prompts import WORKED_EXAMPLES, wrap
from lwzlib.method.rewards import FormatReward, LengthReward, OverlongReward, RewardError, build_rewards
from lwzlib.method.text import parse

PLAN, ANSWER = WORKED_EXAMPLES["en"][0][1:]
CLEAN = wrap(PLAN, ANSWER, "think")
FORM, CREDIT = FormatReward(0.6, 0.05), FormatReward(0.6, 0.05, partial_credit=0.1)
RANGES = st.tuples(st.integers(0, 500), st.integers(0, 500)).map(sorted).map(tuple)


@pytest.mark.parametrize(("words", "reward"), [
    (0, 0), (1, 1 / 50), (49, 49 / 50), (50, 1), (51, 1), (100, 1), (101, 99 / 100), (199, 1 / 100), (200, 0), (201, 0),
    (10**9, 0)])
def test_length_at_and_around_the_corners(words, reward):
    assert LengthReward(200).score(words, (50, 100)) == pytest.approx(reward, abs=1e-12)


@given(st.integers(0, 1200), RANGES)
def test_length_equals_the_published_formula(words, word_range):
    lower, upper = word_range
    expected = 1 if lower <= words <= upper else words / lower if words < lower else (1000 - words) / (1000 - upper)
    assert LengthReward(1000).score(words, word_range) == pytest.approx(max(expected, 0))


@given(RANGES, st.integers(0, 1200), st.integers(0, 1200))
def test_length_rises_to_the_range_and_falls_after_it(word_range, one, other):
    near, far = (LengthReward(1000).score(words, word_range) for words in sorted([one, other]))
    assert 0 <= near <= 1
    if max(one, other) <= word_range[1]:
        assert near <= far
    if min(one, other) >= word_range[0]:
        assert near >= far


@pytest.mark.parametrize("word_range", [(50, 200), (50, 201), (100, 50), (-1, 50)])
def test_length_refuses_a_range_that_does_not_fit_and_names_it(word_range):
    with pytest.raises(ValueError, match=rf"\[{word_range[0]}, {word_range[1]}\].*max_words = 200"):
        LengthReward(200).score(10, word_range)


@given(RANGES.filter(any), st.integers(0, 1200), st.sampled_from([1.5, 2.0, 3.0]))
def test_a_ratio_is_the_formula_with_a_max_of_each_request(word_range, words, ratio):
    most = ratio * word_range[1]
    assert LengthReward(1, ratio).score(words, word_range) == LengthReward(most).score(words, word_range)


def test_a_ratio_at_which_the_upper_bound_is_too_long_is_refused():
    with pytest.raises(RecipeError, match=r"reward.length.max_ratio = 1.0 must be above 1, or 0 for max_words"):
        load_recipe("nano", "reward.length.max_ratio=1.0")


def test_length_counts_the_answer_only():
    texts = [wrap("one two three four", "five six", "think"), "<think>one two three", "five six"]
    assert LengthReward(10)(texts, word_range=[(4, 5)] * 3, style=["think"] * 3) == [0.5, 0, 0]


@pytest.mark.parametrize("style", ["think", "direct"])
def test_format_is_1_for_a_clean_completion_and_0_for_a_broken_one(style):
    good = wrap(PLAN, ANSWER, style)
    broken = [good + " x", good.replace("</answer>", ""), ANSWER, good + good, ""]
    assert FORM([good, *broken], style=[style] * 6) == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("text", "tags"), [
    ("nothing", 0), ("<think>a", 1), ("<think>a</think><answer>b", 3), ("<think><think></think>", 0), (CLEAN + "x", 4),
    (CLEAN + CLEAN, 0), (CLEAN + "<answer>", 2), ("<answer>b</answer><think>a</think>", 0),
    ("<think><answer>b</answer></think>", 1)])
def test_partial_credit_counts_tags_in_their_place(text, tags):
    assert CREDIT([text], style=["think"]) == [pytest.approx(0.1 * tags)]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "word "]), max_size=12))
def test_tags_in_place_are_a_beginning_of_the_form_and_stand_nowhere_else(pieces):
    form = ["<think>", "</think>", "<answer>", "</answer>"]
    assert [parse("".join(form[:n]), "think").tags_in_place for n in range(5)] == [0, 1, 2, 3, 4]
    found = [piece for piece in pieces if piece in form]
    n = parse("".join(pieces), "think").tags_in_place
    assert found[:n] == form[:n]
    assert not set(found[n:]) & set(form[:n])


@pytest.mark.parametrize(("plan", "score"), [("", 0.4), ("Two words.", 0.4), ("三个字", 1), ("A plan of five words.", 1)])
def test_a_plan_of_too_few_words_leaves_partial_credit_only(plan, score):
    form = FormatReward(0.6, 0.05, partial_credit=0.1, min_plan_words=3)
    assert form([wrap(plan, ANSWER, "think")], style=["think"]) == [pytest.approx(score)]
    assert form([wrap("", ANSWER, "direct")], style=["direct"]) == [1]
    assert FORM([wrap("", ANSWER, "think")], style=["think"]) == [1]


def test_partial_credit_never_reaches_the_exact_form():
    most = load_recipe("nano", {"reward.format.partial_credit": 0.2499}).reward.format.partial_credit
    scores = FormatReward(0.6, 0.05, most)([CLEAN + "x", CLEAN], style=["think"] * 2)
    assert 0.9 < scores[0] < scores[1]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_more_of_the_answer_repeats_the_lower_the_format(language):
    plan, answer = WORKED_EXAMPLES[language][0][1:]
    scores = [FORM.score(wrap(plan, answer * times, "think"), "think") for times in (1, 2, 4, 20)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 1
    assert scores[1] < 0.6
    assert scores[3] < 0.1


def test_repetition_within_the_tolerance_is_free():
    text = "<answer>" + ANSWER + " The end. The end.</answer>"
    assert FORM.score(text, "direct") == 1
    assert FormatReward(0.6, 0.0).score(text, "direct") < 1


def test_a_plan_copied_as_the_answer_scores_low():
    assert FORM.score(wrap(ANSWER, ANSWER, "think"), "think") < 0.1
    assert FORM.score(wrap(PLAN, ANSWER, "think"), "think") == 1


@pytest.mark.parametrize("answer", ["", " \n "])
@pytest.mark.parametrize("style", ["think", "direct"])
def test_an_empty_answer_scores_0(answer, style):
    text = wrap(PLAN, answer, style)
    assert FORM.score(text, style) == 0
    assert LengthReward(200)([text], word_range=[(50, 100)], style=[style]) == [0]


@pytest.mark.parametrize("reward", [LengthReward(200), FORM, CREDIT])
def test_rewards_survive_pickling(reward):
    asked = {"completions": [CLEAN, "<answer>b", CLEAN * 2], "style": ["think"] * 3, "word_range": [(40, 60)] * 3}
    again = pickle.loads(pickle.dumps(reward))
    assert again == reward
    assert again.__name__ == reward.__name__
    assert again(**asked) == reward(**asked)


@pytest.mark.parametrize("reward", [LengthReward(200), CREDIT])
def test_conversational_completions_score_like_texts(reward):
    texts = [CLEAN, "<answer>b", ""]
    asked = {"style": ["think"] * 3, "word_range": [(60, 80)] * 3, "prompts": ["p"] * 3}
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions=turns, **asked) == reward(completions=texts, **asked)
    assert reward(completions=texts, **asked)[0] > 0.5


def test_build_refuses_a_weight_on_the_writing_reward():
    with pytest.raises(ValueError, match=r"reward\.weights\.writing"):
        build_rewards(load_recipe("paper"))


def test_build_leaves_out_components_of_weight_0_and_passes_the_quantities_on():
    lexical = load_recipe("nano", {"reward.weights.writing": 0.0, "reward.format.encoder": "",
                                     "reward.format.min_plan_words": 3})
    assert build_rewards(lexical) == {"length": LengthReward(160), "format": FormatReward(
        0.6, 0.05, 0.1, 3, "", ("en",), lexical.reward.format.same_meaning)}
    only = load_recipe("nano", {"reward.weights.writing": 0.0, "reward.weights.format": 0.0})
    assert list(build_rewards(only)) == ["length"]
    with pytest.raises(ValueError, match="all 0"):
        build_rewards(load_recipe("nano", dict.fromkeys(
            (f"reward.weights.{name}" for name in ("length", "writing", "format")), 0.0)))


@pytest.mark.parametrize("text", [
    "", " ", "\x00", "\ud800", "word " * 200_000, "字" * 1_000_000, "x" * 1_000_000,
    random.Random(0).randbytes(300_000).decode("latin-1")],
    ids=["empty", "space", "null", "surrogate", "words", "han", "letters", "binary"])
def test_rewards_are_in_0_to_1_for_empty_enormous_and_binary_texts(text):
    texts = [text, wrap(text, text, "think"), "<think>a</think><answer>" + text]
    for reward in (LengthReward(200), CREDIT):
        values = reward(texts, style=["think"] * 3, word_range=[(50, 100)] * 3)
        assert all(type(value) in (int, float) and 0 <= value <= 1 for value in values)


@settings(deadline=None)
@given(st.text(), st.text(), st.sampled_from(["think", "direct"]))
def test_rewards_are_in_0_to_1_for_any_text(plan, answer, style):
    for reward in (LengthReward(200), CREDIT):
        assert all(0 <= v <= 1 for v in reward([wrap(plan, answer, style)], style=[style], word_range=[(5, 9)]))


def test_breaking_the_form_never_pays_for_a_loop():
    most = FormatReward(0.6, 0.05, 0.1)
    loop = "<think>A plan.</think><answer>" + "The same sentence stands here again. " * 30 + "</answer>"
    assert most.score(loop + "x", "think") <= most.score(loop, "think")


@settings(deadline=None)  # the first call imports TRL
@given(st.integers(1, 60), st.integers(1, 60), st.lists(st.integers(0, 80), max_size=9))
def test_overlong_falls_evenly_over_the_last_tokens(cache, more, lengths):
    limit = cache + more
    found = OverlongReward(limit, cache)([""] * len(lengths), completion_ids=[range(n) for n in lengths])
    assert found == pytest.approx([-min(1.0, max(0.0, (n - more) / cache)) for n in lengths])
    assert OverlongReward(limit, cache)([""] * len(lengths)) == [None] * len(lengths), "a text without tokens is not judged"


def test_overlong_is_built_where_it_weighs_something():
    off = {"reward.weights.writing": 0.0, "reward.format.encoder": ""}
    assert "overlong" not in build_rewards(load_recipe("nano", off))
    on = off | {"reward.weights.overlong": 0.5, "reward.overlong.cache_tokens": 44}
    assert build_rewards(load_recipe("nano", on))["overlong"] == OverlongReward(224, 44)
    with pytest.raises(RewardError, match=r"cache_tokens = 2800 must be at most grpo.sampling.max_new_tokens = 224"):
        build_rewards(load_recipe("nano", off | {"reward.weights.overlong": 0.5}))
