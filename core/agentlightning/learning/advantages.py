"""Group-relative advantages: how much better a return was than those of the other rollouts of its group.

Every episode counts once in its group's statistics, by the mean of its returns, whatever its number of calls.
Formulas, with R the episode returns of a group of n >= 2, and G a transition's return:

    GRPO         (G - mean R) / (std R + eps)   DeepSeekMath, arXiv:2402.03300, eq. 3; std over n - 1
    GRPO_NO_STD  G - mean R                     Dr. GRPO, arXiv:2503.20783, section 3.2: no std
    DR_GRPO      as GRPO_NO_STD; the batch then divides by a constant length instead of each episode's
    RLOO         G - mean of the other R        Ahmadian et al., arXiv:2402.14740, eq. 7

A group of one has nothing to compare with: its advantages are 0 (VeRL keeps the raw return there).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from agentlightning.types import Floats

EPS = 1e-6
FLAT = 1e-6  # a spread of returns below this is floating-point noise, not a difference


class Estimator(StrEnum):
    """Names of the group baselines."""

    GRPO = "grpo"
    GRPO_NO_STD = "grpo_no_std"
    DR_GRPO = "dr_grpo"
    RLOO = "rloo"


def group_advantages(
    returns: Sequence[Floats], groups: Sequence[str], estimator: Estimator = Estimator.GRPO
) -> list[Floats]:
    """One array of advantages per episode, shaped like its returns.

    `returns[e]` is [T_e] (from credit assignment), `groups[e]` the episode's group id. Episodes without a
    transition are ignored in the statistics.
    """
    advantages = [np.zeros_like(r, dtype=np.float32) for r in returns]
    for group in dict.fromkeys(groups):
        members = [e for e, g in enumerate(groups) if g == group and len(returns[e])]
        episode_returns = np.array([float(np.mean(returns[e], dtype=np.float64)) for e in members])
        flat = all(float(np.ptp(returns[e])) < FLAT for e in members)
        if len(members) < 2 or (flat and float(np.ptp(episode_returns)) < FLAT):
            continue
        for i, e in enumerate(members):
            advantages[e] = _advantage(returns[e], episode_returns, i, estimator)
    return advantages


def _advantage(returns: Floats, group: np.ndarray, index: int, estimator: Estimator) -> Floats:
    mean = float(group.mean())
    if estimator is Estimator.RLOO:
        mean = float((group.sum() - group[index]) / (len(group) - 1))
    scale = 1.0
    if estimator is Estimator.GRPO:
        scale = float(group.std(ddof=1)) + EPS
    return ((returns.astype(np.float64) - mean) / scale).astype(np.float32)
