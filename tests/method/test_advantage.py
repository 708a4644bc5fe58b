"""Advantages against plain loops and TRL's two formulas, and what scale, NaN and constant groups do to them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lwzlib.base.recipe import load_recipe
from lwzlib.method import advantage
from lwzlib.method.advantage import MODES, PAPER, Fusion, averaged, no_variance
from lwzlib.method.prompts import wrap

NAN, ONES = float("nan"), [1.0, 1.0, 1.0]


def fuse(rewards, weights, mode="zscore", clip=0.0, counts=None):
    """The kit's `fuse`; where a test does not say which rewards count in mode `gate`, all of them do."""
    if counts is None and mode == "gate":
        counts = np.full(np.shape(rewards), True)
    return advantage.fuse(rewards, weights, mode, clip, counts)


def _random(seed, groups=5, size=6, components=3):
    return np.random.default_rng(seed).uniform(0, 1, (groups, size, components))


def _zscore_by_loops(rewards, weights):
    result = np.zeros(rewards.shape[:2])
    for g, group in enumerate(rewards.tolist()):
        for values, weight in zip(zip(*group, strict=True), weights, strict=True):
            mean = sum(values) / len(values)
            std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
            for i, value in enumerate(values):
                result[g, i] += weight * (value - mean) / (std + 1e-4) / sum(weights)
    return result


def _trl_sum_then_normalize(rewards, weights):
    summed = (torch.tensor(rewards) * torch.tensor(weights, dtype=torch.float64)).sum(-1)
    return ((summed - summed.mean(1, keepdim=True)) / (torch.std(summed, 1, keepdim=True) + 1e-4)).numpy()


def _trl_normalize_then_sum(rewards, weights):
    grouped = torch.tensor(rewards)
    whitened = (grouped - grouped.mean(1, keepdim=True)) / (torch.std(grouped, 1, keepdim=True) + 1e-4)
    summed = (whitened * torch.tensor(weights, dtype=torch.float64)).sum(-1)
    return ((summed - summed.mean()) / (torch.std(summed) + 1e-4)).numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1, [1, 40, 0.2]])
def test_zscore_is_the_papers_three_lines_where_every_reward_is_there_and_varies(seed, scale):
    rewards = _random(seed) * scale
    np.testing.assert_allclose(fuse(rewards, ONES, "zscore"), averaged(rewards), rtol=0, atol=5e-3)  # epsilon is 1e-4
    assert np.abs(averaged(rewards)).max() > 0.5


@pytest.mark.parametrize("weights", [ONES, [2.0, 0.0, 1.0], [0.3, 0.3, 5.0]])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("mode", "oracle"), [
    ("zscore", _zscore_by_loops), ("sum", _trl_sum_then_normalize), ("gdpo", _trl_normalize_then_sum)])
def test_mode_equals_its_oracle(mode, oracle, seed, weights):
    rewards = _random(seed)
    np.testing.assert_allclose(fuse(rewards, weights, mode), oracle(rewards, weights), rtol=1e-9, atol=1e-12)


def test_minmax_equals_a_value_worked_by_hand():
    rewards = [[[0.0, 5.0], [0.25, 9.0], [1.0, 7.0]]]
    np.testing.assert_allclose(fuse(rewards, [1, 1], "minmax"), [[-1.0, 0.25, 0.5]])
    np.testing.assert_allclose(fuse(rewards, [3, 1], "minmax"), [[-1.0, -0.125, 0.75]])


@pytest.mark.parametrize("mode", ["zscore", "sum", "gdpo"])
@pytest.mark.parametrize("seed", range(3))
def test_mean_of_each_group_is_0(mode, seed):
    advantages = fuse(_random(seed), ONES, mode)
    assert np.abs(advantages.mean(axis=1)).max() < 1e-12
    assert np.abs(advantages).max() > 0.1


def test_zscore_ignores_the_scale_of_a_component_and_sum_does_not():
    rewards = _random(0)
    rescaled = rewards * [50, 1, 1] + [7, 0, 0]
    np.testing.assert_allclose(fuse(rewards, ONES), fuse(rescaled, ONES), atol=2e-3)
    assert np.abs(fuse(rewards, ONES, "sum") - fuse(rescaled, ONES, "sum")).max() > 0.3


@pytest.mark.parametrize("scale", [0.1, 100])
def test_minmax_ignores_the_scale_of_a_component(scale):
    rescaled = _random(1) * [1, scale, 1] + [0, 3, 0]
    np.testing.assert_allclose(fuse(rescaled, ONES, "minmax"), fuse(_random(1), ONES, "minmax"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 0.3, 1 / 3, 1.0])
def test_a_constant_group_gets_0_and_the_others_do_not(mode, value):
    rewards = _random(2)
    rewards[1] = value
    largest = np.abs(fuse(rewards, ONES, mode)).max(axis=1)
    assert largest[1] < 1e-9 < 0.1 < min(largest[[0, 2, 3, 4]])
    assert (fuse(np.full((2, 4, 3), value), ONES, mode) == 0).all()


def test_float32_noise_in_a_constant_group_is_not_blown_up():
    rewards = 0.7 + 1e-7 * _random(0, 1, 8, 1)
    assert all((fuse(rewards, [1], mode) == 0).all() for mode in MODES)


@pytest.mark.parametrize("mode", ["zscore", "minmax"])
def test_a_missing_reward_leaves_its_component_out_for_that_completion(mode):
    rewards = _random(3, groups=1)
    alone = [fuse(rewards[:, :, [k]], [1], mode)[0] for k in range(3)]
    rewards[0, 2, 1] = NAN
    others = [0, 1, 3, 4, 5]
    second = fuse(rewards[:, others][:, :, [1]], [1], mode)[0]  # the second component without that completion
    got = fuse(rewards, [1, 2, 5], mode)[0]
    assert got[2] == pytest.approx((1 * alone[0][2] + 5 * alone[2][2]) / 6)
    np.testing.assert_allclose(got[others], (alone[0][others] + 2 * second + 5 * alone[2][others]) / 8)


@pytest.mark.parametrize("mode", MODES)
def test_a_completion_without_any_reward_gets_0_and_does_not_move_the_others(mode):
    rewards = _random(4, groups=2)
    without = fuse(rewards[:1, 1:], ONES, mode)
    rewards[0, 0] = NAN
    got = fuse(rewards, ONES, mode)
    assert got[0, 0] == 0
    assert np.isfinite(got).all()
    if mode != "gdpo":  # which whitens over the batch, so that the other group counts too
        np.testing.assert_allclose(got[0, 1:], without[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_component_or_a_batch_without_any_reward_is_harmless(mode):
    rewards = _random(5) * [1, 1, NAN]
    np.testing.assert_allclose(fuse(rewards, ONES, mode), fuse(rewards[:, :, :2], ONES[:2], mode))
    assert (fuse(np.full((2, 3, 2), NAN), [1, 1], mode) == 0).all()


@pytest.mark.parametrize("mode", ["zscore", "minmax", "sum"])
def test_groups_do_not_touch_each_other(mode):
    rewards, order = _random(6), [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(fuse(rewards[order], ONES, mode), fuse(rewards, ONES, mode)[order])
    np.testing.assert_array_equal(fuse(rewards[2:3], ONES, mode), fuse(rewards, ONES, mode)[2:3])


@pytest.mark.parametrize("seed", range(5))
def test_minmax_stays_in_minus_1_to_1(seed):
    assert np.abs(fuse(_random(seed) * 100, [1, 2, 3], "minmax")).max() <= 1 + 1e-12
    assert fuse(_random(seed)[:, :, :1], [1], "minmax").min() == -1


@pytest.mark.parametrize(("rewards", "weights", "mode", "message"), [
    (np.zeros((2, 0, 1)), [1], "zscore", "shape"), (np.zeros((0, 4, 1)), [1], "zscore", "shape"),
    (np.zeros((2, 4)), [1], "zscore", "shape"), (np.zeros((2, 4, 2)), [1], "zscore", "2 numbers"),
    (np.zeros((2, 4, 2)), [0, 0], "sum", "not all 0"), (np.zeros((2, 4, 2)), [2, -1], "sum", ">= 0"),
    (np.zeros((2, 4, 2)), [1, NAN], "zscore", "weights"), (np.zeros((2, 4, 2)), [1, np.inf], "zscore", "weights"),
    (np.zeros((2, 4, 1)), [1], "zscor", "unknown advantage mode 'zscor'.*zscore"),
    (np.full((2, 4, 1), np.inf), [1], "zscore", "infinite"), (np.full((2, 4, 1), -np.inf), [1], "sum", "infinite")])
def test_what_cannot_be_fused_is_refused_by_name(rewards, weights, mode, message):
    with pytest.raises(ValueError, match=message):
        fuse(rewards, weights, mode)


def test_no_variance_marks_the_groups_that_teach_nothing():
    rewards = _random(7)
    rewards[1], rewards[3, :, :2], rewards[4, 1:] = 0.3, 0.5, NAN
    assert no_variance(rewards).tolist() == [False, True, False, False, True]


def test_one_failure_among_32_is_as_loud_as_the_clip_lets_it_be():
    rewards = np.ones((1, 32, 1))
    rewards[0, 7] = 0
    alone = fuse(rewards, [1])[0]
    assert alone[7] == pytest.approx(-31 / 32**0.5, abs=0.01) and alone[7] == pytest.approx(-5.48, abs=0.01)
    for mode in ("zscore", "gate", "sum"):
        clipped = fuse(rewards, [1], mode, 2.0)[0]
        assert clipped[7] == -2 and clipped[0] == alone[0] > 0.17
    both = np.concatenate([rewards, np.linspace(0, 1, 32).reshape(1, 32, 1)], axis=2)
    length = fuse(both[:, :, 1:], [1])[0]
    np.testing.assert_allclose(fuse(both, [1, 1], clip=2.0)[0, 7], (-2 + length[7]) / 2)  # before the average, not after


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_a_clip_that_nothing_reaches_changes_no_bit(mode, seed):
    rewards = _random(seed)
    rewards[0, 1, 2] = NAN
    np.testing.assert_array_equal(fuse(rewards, ONES, mode, 100.0), fuse(rewards, ONES, mode))
    assert np.abs(fuse(rewards, ONES, mode, 0.1)).max() <= (np.inf if mode == "gdpo" else 0.1 + 1e-12)


SCORES = st.floats(-10, 10, width=16)
GROUP = st.integers(2, 9).flatmap(lambda size: st.tuples(
    hnp.arrays(float, (1, size, 3), elements=SCORES | st.just(NAN)), hnp.arrays(bool, size), st.integers(0, size - 1)))
WEIGHTS = [1.0, 2.0, 0.5]


def _counts(holds):
    """The last component is the format reward, which always counts."""
    return (holds[:, None] | np.array([False, False, True]))[None]


@settings(deadline=None)
@given(GROUP)
def test_nobody_gains_by_losing_the_form(made):
    rewards, holds, i = made
    with_form, without = holds.copy(), holds.copy()
    with_form[i], without[i] = True, False
    kept, lost = (fuse(rewards, WEIGHTS, "gate", clip, _counts(form))[0, i] for form, clip in
                  ((with_form, 0.0), (without, 0.0)))
    assert lost <= kept + 1e-9
    kept, lost = (fuse(rewards, WEIGHTS, "gate", 1.0, _counts(form))[0, i] for form in (with_form, without))
    assert lost <= kept + 1e-9


@settings(deadline=None)
@given(GROUP)
def test_without_the_form_nothing_is_earned_but_by_format(made):
    rewards, holds, i = made
    holds[i] = False
    paid = fuse(rewards[:, :, :2], WEIGHTS[:2], "gate", 0.0, _counts(holds)[:, :, :2])[0]
    assert paid[i] <= 1e-9 and np.isfinite(paid).all()
    lowest = np.nan_to_num(rewards)
    lowest[0, i, 2] = lowest[0, :, 2].min()  # in `paper` always: a broken form has the format reward 0
    assert fuse(lowest, WEIGHTS, "gate", 0.0, _counts(holds))[0, i] <= 1e-9


@settings(deadline=None)
@given(GROUP)
def test_a_gate_that_all_pass_is_the_papers_and_one_that_nobody_passes_leaves_format_alone(made):
    rewards, holds, _ = made
    np.testing.assert_array_equal(fuse(rewards, WEIGHTS, "gate", 0.0, _counts(holds | True)), fuse(rewards, WEIGHTS))
    complete = np.nan_to_num(rewards)
    np.testing.assert_allclose(fuse(complete, WEIGHTS, "gate", 0.0, _counts(holds & False)) * sum(WEIGHTS),
                               fuse(complete[:, :, 2:], [1]) * WEIGHTS[2], atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_gate_ignores_units_and_offsets(seed):
    rewards = _random(seed)
    counts = np.random.default_rng(seed).random(rewards.shape) < 0.6
    rescaled = rewards * [50, 1, 3] + [7, 0, -2]
    np.testing.assert_allclose(fuse(rewards, ONES, "gate", 0.0, counts), fuse(rescaled, ONES, "gate", 0.0, counts), atol=2e-3)
    assert np.abs(fuse(rewards, ONES, "gate", 0.0, counts) - fuse(rewards, ONES)).max() > 0.1


def test_a_reward_that_failed_stays_left_out_behind_the_gate():
    rewards = [[[0.2, 1.0], [NAN, 0.0], [0.8, 1.0]]]
    counts = [[[True, True], [False, True], [True, True]]]
    got = fuse(rewards, [1, 1], "gate", 0.0, counts)[0]
    assert got[1] == pytest.approx(fuse([[[1.0], [0.0], [1.0]]], [1])[0, 1]), "by format alone"
    np.testing.assert_array_equal(got, fuse(rewards, [1, 1])[0])


@pytest.mark.parametrize(("more", "message"), [
    ({"mode": "gate"}, r"needs counts, booleans of the shape \(2, 4, 1\).*None"), ({"clip": -1.0}, "clip = -1.0"),
    ({"mode": "gate", "counts": np.full((2, 4), True)}, r"got shape \(2, 4\)"), ({"clip": NAN}, "clip = nan")])
def test_a_gate_without_counts_and_a_negative_clip_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        advantage.fuse(np.zeros((2, 4, 1)), [1], **more)


def test_a_recipe_combines_by_its_mode_clip_and_plan():
    assert Fusion.of(load_recipe("paper")) == PAPER == Fusion("zscore", 0.0, 1)
    gate = Fusion.of(load_recipe("nano", "grpo.advantage=gate grpo.advantage_clip=1.5"))
    assert gate == Fusion("gate", 1.5, 5)
    plan = "Rain first, then the stalls."
    texts = [wrap(plan, "Rain fell.", "think"), wrap("Rain.", "Rain fell.", "think"), f"<think>{plan}</think> Rain fell."]
    rewards, names = np.array([[[0.5, 0.9], [1.0, 0.1], [0.9, 0.0]]]), ["length", "format"]
    got = gate(rewards, [1, 1], names, texts, "think")
    counts = np.array([[[True, True], [False, True], [False, True]]])
    np.testing.assert_array_equal(got, advantage.fuse(rewards, [1, 1], "gate", 1.5, counts))
    assert PAPER(rewards, [1, 1], names, texts, "think")[0].argmax() != got[0].argmax() == 0
