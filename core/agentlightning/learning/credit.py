"""Credit assignment: from an episode's final and intermediate rewards to one return per transition.

One signature, `(episode) -> returns [T]`; any function of it will do. Baselines and groups come later, in
`advantages`. Notation: R is the final reward, r_t the intermediate reward of call t (AIR and targeted
rewards), T the number of transitions.

Invariant: `identical` and `air_weighted` keep the mean over the calls at R + sum r, the episode's return, so
that choosing between them moves credit within an episode and never between episodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.references import load_function
from agentlightning.types import Episode

if TYPE_CHECKING:
    from agentlightning.types import Floats

Credit: TypeAlias = "Callable[[Episode], Floats]"


def identical(episode: Episode) -> Floats:
    """Every call gets the episode's whole return: G_t = R + sum of all r.

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


def air_weighted(strength: float = 1.0) -> Credit:
    """Each call answers for its own signals: G_t = R + sum r + strength * T * (r_t - mean r).

    At strength 0 this is `identical`; at 1, G_t = R + T r_t, so no call is paid for another's signals. The
    mean over the calls is the episode's return at any strength. Source: ours; the paper's AIR section
    (arXiv:2508.03680, section 3.3) leaves open how intermediate rewards are spread. Returns [T].
    """
    if not strength >= 0:
        raise InvalidInput(f"the strength of AIR-weighted credit must be zero or more, got {strength}")

    def credit(episode: Episode) -> Floats:
        rewards = np.array([t.reward for t in episode.transitions], dtype=np.float64)
        if not len(rewards):
            return np.zeros(0, dtype=np.float32)
        own = strength * len(rewards) * (rewards - rewards.mean())
        return (_final(episode) + rewards.sum() + own).astype(np.float32)

    return credit


def per_agent(episode: Episode) -> Floats:
    """Agents share the final reward and answer for their own signals only.

    G_t = R + sum of r_k over the calls k of t's agent. Source: ours, the team reward of cooperative games
    with rewards of the agent's own added. Returns [T], equal for the calls of one agent.
    """
    own: defaultdict[str | None, float] = defaultdict(float)
    for transition in episode.transitions:
        own[transition.agent_name] += transition.reward
    final = _final(episode)
    return np.array([final + own[t.agent_name] for t in episode.transitions], dtype=np.float32)


CREDIT: Mapping[str, Credit] = {
    "identical": identical,
    "reward_to_go": discounted(1.0),
    "air_weighted": air_weighted(),
    "per_agent": per_agent,
}


def credit_named(name: str) -> Credit:
    """A credit assigner by its name in `CREDIT`, or a function of yours as MODULE:FUNCTION.

    Raises InvalidInput when there is none.
    """
    if name in CREDIT:
        return CREDIT[name]
    if ":" in name:
        return load_function(name, "credit assignment")
    raise InvalidInput(
        f"unknown credit assignment '{name}'; choose from {', '.join(CREDIT)}, or name a "
        "function of yours as MODULE:FUNCTION"
    )


def _final(episode: Episode) -> float:
    if episode.final_reward is None:
        raise NothingToLearn(
            f"rollout {episode.rollout_id} has no final reward: return one from the agent function, call "
            "emit_reward, or post it to /api/rollouts/{id}/rewards"
        )
    return episode.final_reward
