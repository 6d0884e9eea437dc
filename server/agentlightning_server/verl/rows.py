"""Episodes -> the rows that VeRL trains on, and the weight that each token's advantage has in a batch.

Not here: VeRL's types (`transfer`), torch, or where rows come from (`collecting`). A row is a row of the
batch that `build_batch` makes for the embedded engine, cut at its first sampled token, so both engines learn
from the same tokens, with the same masks, log-probabilities and advantages. What needs the whole batch (the
weights of its episodes, whitening) waits until VeRL has put one together: `weighted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from agentlightning.bridge import LearningSettings, advantages, usable_episodes
from agentlightning.errors import InvalidInput
from agentlightning.learning.advantages import FLAT, Estimator
from agentlightning.learning.batching import Normalise, build_batch
from agentlightning.learning.gae import whiten
from agentlightning.types import Batch, Episode

if TYPE_CHECKING:
    from agentlightning.types import Floats, Logprobs, Mask, TokenIds


class Placed(StrEnum):
    """Where a row's rewards stand, which decides what VeRL's own estimators and metrics see."""

    RETURN = "return"
    """The episode's return at the last token of each of its rows: for estimators that compare whole episodes
    (VeRL's agent loops do the same)."""
    EARNED = "earned"
    """Each call's own reward at its last token, the final one at the episode's: for GAE."""
    FINAL = "final"
    """The final reward alone, as `RETURN`: for validation."""


@dataclass(frozen=True, slots=True)
class Row:
    """One or several calls of an episode whose tokens continue each other: P prompt, R response tokens."""

    rollout_id: str
    prompt_ids: TokenIds  # [P], all before the first sampled token
    response_ids: TokenIds  # [R], sampled ones and what tools and users said in between
    response_mask: Mask  # [R], True for the sampled
    logprobs: Logprobs  # [R], 0 outside the mask
    rewards: Floats  # [R]
    advantages: Floats  # [R], 0 outside the mask; neither weighted nor whitened
    oldest_version: int
    newest_version: int
    turns: int
    """Model calls of the whole episode."""


def make_rows(
    episodes: Sequence[Episode], learning: LearningSettings, placed: Placed = Placed.RETURN
) -> list[Row]:
    """The rows of one group's episodes, in order; episodes without a reward or a call that trains have none.

    Raises NothingToLearn as `make_batch` does, InvalidInput for settings that need the whole batch at once.
    """
    if learning.estimator.whitens and learning.steps is not None:
        raise InvalidInput(
            f"{learning.estimator} whitens over a whole batch, which on VeRL is known after step groups were "
            "added: use another estimator, or no step groups"
        )
    usable = usable_episodes(episodes, learning)
    if not usable:
        return []
    batch = build_batch(
        usable,
        _unwhitened(usable, learning),
        policy=learning.policy,
        normalise=learning.normalisation,
        merge=learning.merge,
    )
    return [_row(batch, index, usable, placed) for index in range(batch.rows)]


def _unwhitened(episodes: Sequence[Episode], learning: LearningSettings) -> list[Floats]:
    match learning.estimator:
        case Estimator.REINFORCE_PP:
            return [learning.credit(episode) for episode in episodes]
        case Estimator.REINFORCE_PP_BASELINE:
            return advantages(episodes, replace(learning, estimator=Estimator.GRPO_NO_STD))
        case _:
            return advantages(episodes, learning)


def _row(batch: Batch, index: int, episodes: Sequence[Episode], placed: Placed) -> Row:
    start, end = batch.row_offsets[index : index + 2]
    first = start + int(np.argmax(batch.response_mask[start:end]))
    calls = batch.transition_index[first:end]
    episode = episodes[int(batch.transition_episode[int(calls[0])])]
    versions = batch.policy_versions[calls[calls >= 0]]
    return Row(
        rollout_id=episode.rollout_id,
        prompt_ids=batch.token_ids[start:first],
        response_ids=batch.token_ids[first:end],
        response_mask=batch.response_mask[first:end],
        logprobs=batch.old_logprobs[first:end],
        rewards=batch.rewards[first:end]
        if placed is Placed.EARNED
        else _at_end(episode, end - first, placed),
        advantages=batch.advantages[first:end],
        oldest_version=int(versions.min()),
        newest_version=int(versions.max()),
        turns=len(episode.transitions),
    )


def _at_end(episode: Episode, size: int, placed: Placed) -> Floats:
    """The last token of a row is always a sampled one."""
    rewards = np.zeros(size, dtype=np.float32)
    rewards[-1] = episode.total_return if placed is Placed.RETURN else episode.final_reward or 0.0
    return rewards


def failed_row(rollout_id: str, eos_id: int, version: int) -> Row:
    """Stands for a rollout that came to nothing, where it must count as a reward of 0: in validation."""
    one = np.array([eos_id], dtype=np.int32)
    none = np.zeros(1, dtype=np.float32)
    mask = np.zeros(1, dtype=np.bool_)
    return Row(rollout_id, one, one, mask, none, none, none, version, version, 0)


def weighted(
    advantages: Sequence[Floats],
    masks: Sequence[Mask],
    episodes: Sequence[str],
    normalise: Normalise,
    *,
    whitens: bool = False,
) -> list[Floats]:
    """Advantage times loss weight of each token of a batch, row by row; 0 outside the masks.

    `episodes[r]` names the episode of row r. The clipped surrogate is linear in a positive factor of the
    advantage, its dual clip too, so their plain sum over tokens is the embedded engine's loss.
    """
    if whitens:
        advantages = _whitened(advantages, masks)
    tokens: dict[str, int] = {}
    for episode, mask in zip(episodes, masks, strict=True):
        tokens[episode] = tokens.get(episode, 0) + int(mask.sum())
    tokens = {episode: count for episode, count in tokens.items() if count}
    return [
        (own * mask * _weight(tokens, episode, normalise)).astype(np.float32)
        for own, mask, episode in zip(advantages, masks, episodes, strict=True)
    ]


def _weight(tokens: dict[str, int], episode: str, normalise: Normalise) -> float:
    """Loss weight of one token, as `build_batch` has it."""
    if episode not in tokens:
        return 0.0
    match normalise:
        case Normalise.EPISODE:
            return 1.0 / (len(tokens) * tokens[episode])
        case Normalise.TOKEN:
            return 1.0 / sum(tokens.values())
        case Normalise.CONSTANT:
            return 1.0 / (len(tokens) * max(tokens.values()))


def _whitened(advantages: Sequence[Floats], masks: Sequence[Mask]) -> list[Floats]:
    values, mask = np.concatenate([*advantages]), np.concatenate([*masks])
    flat = mask.sum() < 2 or float(np.ptp(values[mask])) < FLAT
    result = np.zeros_like(values) if flat else whiten(values, mask)
    return np.split(result, np.cumsum([len(row) for row in advantages])[:-1])
