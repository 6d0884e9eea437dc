"""Credit assignment: from an episode's final and intermediate rewards to one return per transition.

One signature, `(episode) -> returns [T]`. Baselines and groups come later, in `advantages`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.types import Episode

if TYPE_CHECKING:
    from agentlightning.types import Floats

Credit: TypeAlias = "Callable[[Episode], Floats]"


def identical(episode: Episode) -> Floats:
    """Every call gets the episode's whole return: final reward plus all intermediate rewards.

    Source: LightningRL's first credit assignment (arXiv:2508.03680, section 3.3), which has no intermediate
    rewards; adding their sum keeps them in the gradient. Returns [T], all equal.
    """
    total = _final(episode) + sum(t.reward for t in episode.transitions)
    return np.full(len(episode.transitions), total, dtype=np.float32)


def discounted(gamma: float = 1.0) -> Credit:
    """Reward-to-go: G_t = sum over k >= t of gamma^(k-t) r_k, the final reward earned by the last call.

    Source: Sutton & Barto, Reinforcement Learning (2nd ed.), equation 3.8. Returns [T].
    """
    if not 0 <= gamma <= 1:
        raise InvalidInput(f"gamma must lie in [0, 1], got {gamma}")

    def credit(episode: Episode) -> Floats:
        returns = np.zeros(len(episode.transitions), dtype=np.float32)
        following = 0.0
        for t in reversed(range(len(returns))):
            earned = episode.transitions[t].reward + (_final(episode) if t == len(returns) - 1 else 0.0)
            following = earned + gamma * following
            returns[t] = following
        return returns

    return credit


CREDIT: Mapping[str, Credit] = {"identical": identical, "reward_to_go": discounted(1.0)}


def _final(episode: Episode) -> float:
    if episode.final_reward is None:
        raise NothingToLearn(
            f"rollout {episode.rollout_id} has no final reward: return one from the agent function, call "
            "emit_reward, or post it to /api/rollouts/{id}/rewards"
        )
    return episode.final_reward
