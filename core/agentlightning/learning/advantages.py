"""Advantages: how much better a return was than those that it can be compared with.

Every episode counts once in its group's statistics, by the mean of its returns, whatever its number of calls.
Formulas, with R the episode returns of a group of n >= 2, and G a transition's return:

    GRPO          (G - mean R) / (std R + eps)   DeepSeekMath, arXiv:2402.03300, eq. 3; std over n - 1
    GRPO_NO_STD   G - mean R                     Dr. GRPO, arXiv:2503.20783, section 3.2: no std
    DR_GRPO       as GRPO_NO_STD; the batch then divides by a constant length instead of each episode's
    RLOO          G - mean of the other R        Ahmadian et al., arXiv:2402.14740, eq. 7
    REINFORCE_PP  (G - mean G) / (std G + eps)   REINFORCE++, arXiv:2501.03262: over all response tokens of
                                                 the batch, no groups
    REINFORCE_PP_BASELINE  as REINFORCE_PP of G - mean R: its variant with a group baseline

A group of one has nothing to compare with: its group-relative advantages are 0 (VeRL keeps the raw return
there). With `by_agent` the calls of each agent are compared with that agent's calls only, and with
`StepGroups` calls made in the same state with each other as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from agentlightning.errors import InvalidInput
from agentlightning.learning.credit import Credit, discounted, identical
from agentlightning.learning.gae import WHITEN_EPS
from agentlightning.learning.states import observation
from agentlightning.types import Episode, Transition

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentlightning.types import Floats

EPS = 1e-6
FLAT = 1e-6  # a spread of returns below this is floating-point noise, not a difference

State: TypeAlias = "Callable[[Transition], Hashable]"


class Estimator(StrEnum):
    """Names of the baselines."""

    GRPO = "grpo"
    GRPO_NO_STD = "grpo_no_std"
    DR_GRPO = "dr_grpo"
    RLOO = "rloo"
    REINFORCE_PP = "reinforce_pp"
    REINFORCE_PP_BASELINE = "reinforce_pp_baseline"

    @property
    def whitens(self) -> bool:
        """Whether the advantages of the whole batch are brought to mean 0 and variance 1."""
        return self in (Estimator.REINFORCE_PP, Estimator.REINFORCE_PP_BASELINE)


@dataclass(frozen=True, slots=True)
class StepGroups:
    """Compare calls of a group that were made in the same state, besides whole episodes.

    A_t = A(episode) + weight * A(step), where A(step) compares the reward-to-go of the calls that share the
    state, by the estimator's own formula. Source: GiGPO (arXiv:2505.10978, eq. 7 and 8).
    """

    weight: float = 1.0
    gamma: float = 0.95
    """Discount of the reward-to-go."""
    state: State = observation
    """What two calls must have in common."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise InvalidInput(f"the weight of step groups must be zero or more, got {self.weight}")


def advantages_of(
    episodes: Sequence[Episode],
    credit: Credit = identical,
    estimator: Estimator = Estimator.GRPO,
    *,
    by_agent: bool = False,
    steps: StepGroups | None = None,
) -> list[Floats]:
    """One array of advantages [T] per episode."""
    returns = [credit(episode) for episode in episodes]
    groups = [episode.group_id for episode in episodes]
    tokens = [np.array([len(t.response_ids) for t in episode.transitions]) for episode in episodes]
    agents = [[t.agent_name for t in episode.transitions] for episode in episodes] if by_agent else None
    advantages = group_advantages(returns, groups, estimator, parts=agents, tokens=tokens)
    if steps is None or not steps.weight:
        return advantages
    compared = step_advantages(episodes, steps, estimator)
    return [(a + steps.weight * s).astype(np.float32) for a, s in zip(advantages, compared, strict=True)]


def group_advantages(
    returns: Sequence[Floats],
    groups: Sequence[str],
    estimator: Estimator = Estimator.GRPO,
    *,
    parts: Sequence[Sequence[Hashable]] | None = None,
    tokens: Sequence[np.ndarray] | None = None,
) -> list[Floats]:
    """One array of advantages per episode, shaped like its returns.

    `returns[e]` is [T_e] (from credit assignment), `groups[e]` the episode's group id. `parts[e]` names the
    part that each transition belongs to, to compare within parts. `tokens[e]` [T_e] counts response tokens,
    which the estimators that whiten weigh by; 1 each where left out. Episodes without a transition are
    ignored in the statistics.
    """
    if estimator is Estimator.REINFORCE_PP:
        return _whitened(returns, tokens)
    advantages = [np.zeros_like(r, dtype=np.float32) for r in returns]
    for members in _comparable(returns, groups, parts):
        means = np.array([float(returns[e][own].mean(dtype=np.float64)) for e, own in members])
        flat = all(float(np.ptp(returns[e][own])) < FLAT for e, own in members)
        if len(members) < 2 or (flat and float(np.ptp(means)) < FLAT):
            continue
        for i, (e, own) in enumerate(members):
            advantages[e][own] = _advantage(returns[e][own], means, i, estimator)
    return _whitened(advantages, tokens) if estimator.whitens else advantages


def _comparable(
    returns: Sequence[Floats], groups: Sequence[str], parts: Sequence[Sequence[Hashable]] | None
) -> list[list[tuple[int, np.ndarray]]]:
    """For each group, or each part of each group, its (episode, indices of transitions)."""
    found: defaultdict[Hashable, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for e, group in enumerate(groups):
        labels = parts[e] if parts is not None else [None] * len(returns[e])
        for label in dict.fromkeys(labels):
            own = np.array([i for i, other in enumerate(labels) if other == label], dtype=np.int64)
            found[group, label].append((e, own))
    return list(found.values())


def _advantage(returns: np.ndarray, group: np.ndarray, index: int, estimator: Estimator) -> Floats:
    mean = float(group.mean())
    if estimator is Estimator.RLOO:
        mean = float((group.sum() - group[index]) / (len(group) - 1))
    scale = 1.0
    if estimator is Estimator.GRPO:
        scale = float(group.std(ddof=1)) + EPS
    return ((returns.astype(np.float64) - mean) / scale).astype(np.float32)


def _whitened(values: Sequence[NDArray[Any]], tokens: Sequence[np.ndarray] | None) -> list[Floats]:
    """Mean 0 and variance 1 over all response tokens of the batch (VeRL's masked_whiten)."""
    if not values:
        return []
    flat = np.concatenate([np.asarray(v, dtype=np.float64) for v in values])
    counts = np.ones(len(flat)) if tokens is None else np.concatenate([*tokens]).astype(np.float64)
    total = float(counts.sum())
    if total < 2 or float(np.ptp(flat)) < FLAT:
        return [np.zeros_like(v, dtype=np.float32) for v in values]
    mean = float((flat * counts).sum() / total)
    variance = float((np.square(flat - mean) * counts).sum() / (total - 1))
    return [((v - mean) / np.sqrt(variance + WHITEN_EPS)).astype(np.float32) for v in values]


def step_advantages(
    episodes: Sequence[Episode], steps: StepGroups, estimator: Estimator = Estimator.GRPO
) -> list[Floats]:
    """One array per episode: each call against the calls of its group that were made in the same state.

    0 where no other call was. Every call counts once here, also when an episode came to a state twice.
    """
    credit = discounted(steps.gamma)
    returns = [credit(episode) for episode in episodes]
    advantages = [np.zeros_like(r, dtype=np.float32) for r in returns]
    met: defaultdict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for e, episode in enumerate(episodes):
        for t, transition in enumerate(episode.transitions):
            met[episode.group_id, steps.state(transition)].append((e, t))
    for calls in met.values():
        values = np.array([float(returns[e][t]) for e, t in calls])
        if len(calls) < 2 or float(np.ptp(values)) < FLAT:
            continue
        for i, (e, t) in enumerate(calls):
            advantages[e][t] = _advantage(values[i : i + 1], values, i, estimator)[0]
    return advantages
