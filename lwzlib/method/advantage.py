"""Fuse several rewards into one advantage per completion.

The paper averages *advantages*, never raw rewards: A_i = (A_length + A_write + A_format) / 3 with
A_k,i = (r_k,i - mean_group) / std_group, so that each component has the same say in every group, whatever its scale.
Another note of the paper reads "normalised to [-1, 1] in the group": that is `minmax`. `sum` is the naive ablation
(sum the rewards, then whiten) and `gdpo` is TRL's `normalize_then_sum` (whiten per component, sum, whiten the batch).

Not published, chosen here: the sample standard deviation and epsilon 1e-4 are TRL's, so `sum` and `gdpo` equal TRL.
"""

import numpy as np

_EPSILON = 1e-4
_NO_SPREAD = 1e-6  # rewards of order 1 in float32 that differ by less are equal


def fuse(rewards, weights, mode: str = "zscore") -> np.ndarray:
    """Advantages of shape (groups, group_size) from rewards of shape (groups, group_size, components).

    `zscore` and `minmax` leave a NaN reward out: its component does not count for that completion, and the other weights are
    scaled up; `sum` takes it for a raw 0, and `gdpo` for the group's mean, as TRL does. A completion without any reward, and
    a group without variance, get advantage 0. `weights` has shape (components,).
    Raises ValueError for an unknown mode, an empty group, or weights that do not fit.
    """
    rewards, weights = np.asarray(rewards, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if rewards.ndim != 3 or 0 in rewards.shape:
        raise ValueError(f"rewards must have shape (groups, group_size, components), none of them 0; got {rewards.shape}")
    if weights.shape != rewards.shape[2:] or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(f"weights must be {rewards.shape[2]} numbers, finite and >= 0, not all 0; got {weights.tolist()}")
    if mode not in MODES:
        raise ValueError(f"unknown advantage mode {mode!r}; one of {', '.join(MODES)}")
    if np.isinf(rewards).any():
        raise ValueError("a reward is infinite; rewards must be finite, or NaN where a scorer failed")
    return np.nan_to_num(MODES[mode](rewards, weights))


def zscore(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + eps) over axis 1, NaN-aware; exactly 0 where the group does not vary."""
    count = (~np.isnan(rewards)).sum(axis=1, keepdims=True)
    centred = rewards - np.nansum(rewards, axis=1, keepdims=True) / np.maximum(count, 1)
    std = np.sqrt(np.nansum(centred**2, axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return np.where((std > _NO_SPREAD) | np.isnan(centred), centred / (std + _EPSILON), 0.0)


def minmax(rewards: np.ndarray) -> np.ndarray:
    """2 (r - min) / (max - min) - 1 over axis 1, NaN-aware; 0 where the group does not vary."""
    low = np.min(rewards, axis=1, keepdims=True, initial=np.inf, where=~np.isnan(rewards))
    high = np.max(rewards, axis=1, keepdims=True, initial=-np.inf, where=~np.isnan(rewards))
    spread = np.where(high - low > _NO_SPREAD, high - low, np.inf)
    scaled = 2 * (rewards - low) / spread - 1
    return np.where(np.isinf(spread) & ~np.isnan(rewards), 0.0, scaled)


def _average(advantages: np.ndarray, weights: np.ndarray) -> np.ndarray:
    present = ~np.isnan(advantages) * weights
    total = present.sum(axis=2)
    return np.nansum(advantages * weights, axis=2) / np.where(total > 0, total, np.inf)


def _sum(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    summed = np.nansum(rewards * weights, axis=2)
    summed[np.isnan(rewards).all(axis=2)] = np.nan
    return zscore(summed)


def _gdpo(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    summed = np.nansum(zscore(rewards) * weights, axis=2)
    summed[np.isnan(rewards).all(axis=2)] = np.nan
    return zscore(summed.reshape(1, -1)).reshape(summed.shape)


MODES = {
    "zscore": lambda rewards, weights: _average(zscore(rewards), weights),
    "minmax": lambda rewards, weights: _average(minmax(rewards), weights),
    "sum": _sum,
    "gdpo": _gdpo,
}


def no_variance(rewards) -> np.ndarray:
    """(groups,) booleans: no component varies within the group, so it teaches nothing."""
    return (np.nan_to_num(zscore(np.asarray(rewards, dtype=np.float64))) == 0).all(axis=(1, 2))
