"""Texts of a given length and repetition, the table of their rewards, its map and the sliders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from lwzlib.lab import sliders
from lwzlib.lab.sliders import reward_table
from lwzlib.method import rewards
from lwzlib.method.text import count_words

RANGE = (150, 250)
LONGEST_SENTENCE = max(map(count_words, sliders.sentences()))


@pytest.fixture
def built():
    return {"length": rewards.LengthReward(500), "format": rewards.FormatReward(0.6, 0.05)}


@settings(max_examples=60, deadline=None)
@given(st.integers(40, 480), st.floats(0, 0.9))
def test_a_text_is_as_long_and_as_repetitive_as_whole_sentences_allow(words, repetition):
    fresh, again = sliders.text_of(words, repetition)
    assert set(again) <= set(fresh) and len(set(fresh)) == len(fresh)
    assert abs(sum(map(count_words, fresh + again)) - words) <= LONGEST_SENTENCE
    assert repetition or not again


def test_the_honest_sentences_repeat_nothing(built):
    assert built["format"].overlaps([" ".join(sliders.sentences())], [""])[0].share == 0


@pytest.mark.parametrize(("words", "repetition", "said"), [(900, 0.0, "need 900 new ones"), (100, 1.0, "repetition = 1.0")])
def test_what_cannot_be_written_is_refused(words, repetition, said):
    with pytest.raises(ValueError, match=said):
        sliders.text_of(words, repetition)


def test_the_table_shows_what_each_reward_looks_at(built):
    found = reward_table(built, RANGE, [100, 200, 400], [0.0, 0.5])
    for row in found.itertuples():
        assert row.length == built["length"].score(row.answer_words, RANGE)
    plain, half = found[found.repetition == 0], found[found.repetition == 0.5]
    assert (plain.format == 1).all() and (half.format < 0.7).all()
    assert abs(half.repeated - 0.5).max() < 0.2
    best = found.loc[found.advantage.idxmax()]
    assert (best.words, best.repetition) == (200, 0.0)
    assert abs(found.advantage.sum()) < 1e-9


def test_a_map_has_a_cell_for_each_text_and_marks_the_range(built):
    found = reward_table(built, RANGE, [100, 200, 400], [0.0, 0.5])
    ax = sliders.surface(found, Figure().subplots(), "format", RANGE)
    grid = ax.collections[0].get_array()
    assert grid.shape == (2, 3) and grid[0].tolist() == [1, 1, 1]
    assert [line.get_xdata()[0] for line in ax.lines] == list(RANGE)


def test_the_sliders_move_the_rewards(built):
    words, share, length, form, text = sliders.sliders(built, RANGE).children
    assert length.children[0].value == form.children[0].value == 1 and "<b></b>" in text.value
    words.value = 400
    assert length.children[0].value < 0.5 and form.children[0].value == 1
    share.value = 0.5
    assert form.children[0].value < 0.7 and form.children[1].value == f"format {form.children[0].value:.2f}"
    assert "of them repeated" in text.value and "<b>You smell" in text.value
