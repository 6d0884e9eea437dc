"""Generalised advantage estimation over the response tokens of each episode, for policies with a critic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from agentlightning.types import Batch

if TYPE_CHECKING:
    from agentlightning.types import Floats

WHITEN_EPS = 1e-8  # VeRL's, inside the root


def gae(batch: Batch, values: Floats, *, gamma: float = 1.0, lam: float = 1.0) -> tuple[Floats, Floats]:
    """Advantages and value targets of the batch's tokens, [N] each, 0 outside the responses.

    With V the values [N] (of the state before each response token), over the response tokens of an episode in
    the order in which they were sampled, whatever rows they lie in:

        delta_i = r_i + gamma V_{i+1} - V_i      A_i = delta_i + gamma lam A_{i+1}      target_i = A_i + V_i

    The tokens of prompts and tool results in between are skipped. Source: Schulman et al., arXiv:1506.02438,
    equation 16; masked as VeRL's `compute_gae_advantage_return`, which then whitens, as `whiten` does.
    """
    advantages = np.zeros(batch.tokens, dtype=np.float32)
    targets = np.zeros(batch.tokens, dtype=np.float32)
    places = np.flatnonzero(batch.response_mask)
    places = places[np.argsort(batch.transition_index[places], kind="stable")]
    episodes = batch.transition_episode[batch.transition_index[places]]
    following_value = following_advantage = 0.0
    for i in reversed(range(len(places))):
        place = places[i]
        if i + 1 == len(places) or episodes[i + 1] != episodes[i]:
            following_value = following_advantage = 0.0
        value = float(values[place])
        delta = float(batch.rewards[place]) + gamma * following_value - value
        following_advantage = delta + gamma * lam * following_advantage
        following_value = value
        advantages[place] = following_advantage
        targets[place] = following_advantage + value
    return advantages, targets


def whiten(values: Floats, mask: np.ndarray) -> Floats:
    """Mean 0 and variance 1 (over n - 1) over the masked places, 0 elsewhere. Shapes [N]."""
    chosen = values[mask].astype(np.float64)
    result = np.zeros(len(values), dtype=np.float32)
    if len(chosen) > 1:
        result[mask] = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + WHITEN_EPS)
    return result
