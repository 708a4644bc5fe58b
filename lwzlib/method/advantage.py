"""Fuse several rewards into one advantage per completion: average the advantages, never the rewards.

The paper's A_i = (A_length + A_write + A_format) / 3 with A_k,i = (r_k,i - mean_group) / std_group gives each component the
same say in every group, whatever its scale. `averaged` below is that idea; `fuse` is what the kit trains with, and `Fusion` how
a recipe asks for it. docs/rewards.md compares the modes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lwzlib.base.recipe import Recipe
from lwzlib.method.text import Style, has_form, parse


def averaged(rewards: np.ndarray) -> np.ndarray:
    """The paper's advantages (groups, group_size) of rewards (groups, group_size, components) that vary in every group."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    advantages = centred / rewards.std(axis=1, ddof=1, keepdims=True)
    return advantages.mean(axis=2)


# Beyond it, `fuse` handles weights of the components, missing rewards (NaN), groups without variance, and other modes.
# Not published, chosen here: the sample standard deviation and epsilon 1e-4 are TRL's, so `sum` and `gdpo` equal TRL.
_EPSILON = 1e-4
_NO_SPREAD = 1e-6  # rewards of order 1 in float32 that differ by less are equal


def fuse(rewards, weights, mode: str = "zscore", clip: float = 0.0, counts=None) -> np.ndarray:
    """Advantages of shape (groups, group_size) from rewards of shape (groups, group_size, components).

    `zscore` is the paper's mode, `minmax` what another note on it says (normalise to [-1, 1] in the group). They leave a NaN
    reward out: its component does not count for that completion, and the other weights are scaled up. `sum` is the naive
    ablation (sum the rewards, then whiten them to mean 0 and deviation 1) and counts a NaN reward as 0; `gdpo` is TRL's
    `normalize_then_sum` (whiten per component, sum, whiten the batch) and treats NaN as the group's mean, as TRL does. `gate`
    is `zscore` after each reward for which `counts` (booleans of the shape of `rewards`) is False has become the lowest of its
    component in the group. A completion without any reward, and a group without variance, get advantage 0.

    `weights` has shape (components,). A `clip` above 0 limits the advantage of each component to [-clip, clip] before they are
    combined (in `sum`, where there is one, that one): a single failure among n has z = -(n - 1) / sqrt(n), -5.5 among 32. The
    mean over the group is no longer 0 then. Raises ValueError for an unknown mode, a negative clip, an empty group, weights or
    `counts` that do not fit.
    """
    rewards, weights = np.asarray(rewards, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if rewards.ndim != 3 or 0 in rewards.shape:
        raise ValueError(f"rewards must have shape (groups, group_size, components), none of them 0; got {rewards.shape}")
    if weights.shape != rewards.shape[2:] or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(f"weights must be {rewards.shape[2]} numbers, finite and >= 0, not all 0; got {weights.tolist()}")
    if mode not in MODES:
        raise ValueError(f"unknown advantage mode {mode!r}; one of {', '.join(MODES)}")
    if not clip >= 0:
        raise ValueError(f"clip = {clip} must be above 0, or 0 for no limit")
    if np.isinf(rewards).any():
        raise ValueError("a reward is infinite; rewards must be finite, or NaN where a scorer failed")
    if mode == "gate":
        rewards = _gated(rewards, counts)
    return np.nan_to_num(MODES[mode](rewards, weights, clip or np.inf))


def zscore(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + eps) over axis 1; NaN stays NaN, and a group that does not vary gets exactly 0."""
    count = (~np.isnan(rewards)).sum(axis=1, keepdims=True)
    centred = rewards - np.nansum(rewards, axis=1, keepdims=True) / np.maximum(count, 1)
    std = np.sqrt(np.nansum(centred**2, axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return np.where((std > _NO_SPREAD) | np.isnan(centred), centred / (std + _EPSILON), 0.0)


def minmax(rewards: np.ndarray) -> np.ndarray:
    """2 (r - min) / (max - min) - 1 over axis 1; NaN stays NaN, and a group that does not vary gets 0."""
    present = ~np.isnan(rewards)
    low = np.min(rewards, axis=1, keepdims=True, initial=np.inf, where=present)
    high = np.max(rewards, axis=1, keepdims=True, initial=-np.inf, where=present)
    spread = np.where(high - low > _NO_SPREAD, high - low, np.inf)
    return np.where(np.isinf(spread) & present, 0.0, 2 * (rewards - low) / spread - 1)


def _gated(rewards: np.ndarray, counts) -> np.ndarray:
    if counts is None or np.shape(counts) != rewards.shape:
        raise ValueError(f"mode gate needs counts, booleans of the shape {rewards.shape} of the rewards; got shape "
                         f"{None if counts is None else np.shape(counts)}")
    lowest = np.min(rewards, axis=1, keepdims=True, initial=np.inf, where=~np.isnan(rewards))
    return np.where(np.asarray(counts, dtype=bool) | np.isnan(rewards), rewards, lowest)


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = (~np.isnan(values) * weights).sum(axis=2)
    return np.nansum(values * weights, axis=2) / np.where(total > 0, total, np.inf)


def _weighted_sum(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values).all(axis=2), np.nan, np.nansum(values * weights, axis=2))


def _averaged(normalise):
    return lambda rewards, weights, clip: _weighted_mean(np.clip(normalise(rewards), -clip, clip), weights)


def _sum(rewards: np.ndarray, weights: np.ndarray, clip: float) -> np.ndarray:
    return np.clip(zscore(_weighted_sum(rewards, weights)), -clip, clip)


def _gdpo(rewards: np.ndarray, weights: np.ndarray, clip: float) -> np.ndarray:
    summed = _weighted_sum(np.clip(zscore(rewards), -clip, clip), weights)
    return zscore(summed.reshape(1, -1)).reshape(summed.shape)


MODES = {"zscore": _averaged(zscore), "minmax": _averaged(minmax), "sum": _sum, "gdpo": _gdpo, "gate": _averaged(zscore)}


@dataclass(frozen=True)
class Fusion:
    """How a recipe combines rewards: a mode of `fuse`, its clip, and the plan without which the form does not hold.

    Trainer, `distil`, the hack suite and the sliders all combine by it. In mode `gate` the rewards of a completion count where
    its form holds (`text.has_form`); the format reward, which teaches the form, always does.
    """

    mode: str = "zscore"
    clip: float = 0.0
    min_plan_words: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> "Fusion":
        """The one that the recipe names."""
        return cls(recipe.grpo.advantage, recipe.grpo.advantage_clip, recipe.reward.format.min_plan_words)

    def __call__(self, rewards: np.ndarray, weights, names: Sequence[str], completions: Sequence[str],
                 style: Style) -> np.ndarray:
        """Advantages (groups, group_size) of rewards (groups, group_size, components), whose components have these `names`.
        `completions` are whole texts, group after group. Raises ValueError as `fuse` does."""
        counts = None
        if self.mode == "gate":
            holds = [has_form(parse(completion, style), style, self.min_plan_words) for completion in completions]
            counts = np.reshape(holds, (*rewards.shape[:2], 1)) | [name == "format" for name in names]
        return fuse(rewards, weights, self.mode, self.clip, counts)


PAPER = Fusion()


def no_variance(rewards) -> np.ndarray:
    """Booleans (groups,): no component varies within the group, so it teaches nothing."""
    return (np.nan_to_num(zscore(np.asarray(rewards, dtype=np.float64))) == 0).all(axis=(1, 2))
