"""Episodes with advantages -> one `Batch` of token rows, calls that continue each other merged into one row.

A call whose prompt starts with all tokens of an earlier row of its episode (prompt and responses) continues
that row exactly, so the shared tokens are computed once and the gradient stays the same. Nothing is
re-tokenised, padded or cut here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.types import Batch, Episode, Transition

if TYPE_CHECKING:
    from agentlightning.types import Floats


class Normalise(StrEnum):
    """What one unit of loss weight is."""

    EPISODE = "episode"
    """Each episode weighs the same: token weight 1 / (episodes * its response tokens). The default."""
    TOKEN = "token"
    """Each response token weighs the same: 1 / tokens of the batch (DAPO, arXiv:2503.14476, eq. 8)."""
    CONSTANT = "constant"
    """1 / (episodes * tokens of the longest episode), one divisor for all (Dr. GRPO, arXiv:2503.20783)."""


@dataclass(slots=True)
class _Row:
    """A row being built; `pieces` alternate context and responses."""

    episode: int
    tokens: list[int] = field(default_factory=list[int])
    responses: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(start position in the row, transition index) of each response."""


def merge_transitions(transitions: Sequence[Transition], *, merge: bool = True) -> list[list[int]]:
    """Indices of the transitions that share a row, in call order; one row each with `merge=False`."""
    rows = _rows(transitions, episode=0, first=0, merge=merge)
    return [[index for _, index in row.responses] for row in rows]


def _rows(transitions: Sequence[Transition], *, episode: int, first: int, merge: bool) -> list[_Row]:
    rows: list[_Row] = []
    for index, transition in enumerate(transitions, start=first):
        prompt: list[int] = transition.prompt_ids.tolist()
        row = _longest_continued(rows, prompt) if merge else None
        if row is None:
            row = _Row(episode)
            rows.append(row)
        row.tokens += prompt[len(row.tokens) :]
        row.responses.append((len(row.tokens), index))
        row.tokens += transition.response_ids.tolist()
    return rows


def _longest_continued(rows: Sequence[_Row], prompt: list[int]) -> _Row | None:
    fitting = [
        row for row in rows if len(row.tokens) <= len(prompt) and row.tokens == prompt[: len(row.tokens)]
    ]
    return max(fitting, key=lambda row: len(row.tokens), default=None)


def build_batch(
    episodes: Sequence[Episode],
    advantages: Sequence[Floats],
    *,
    policy: str,
    normalise: Normalise = Normalise.EPISODE,
    merge: bool = True,
) -> Batch:
    """Pack episodes into rows.

    `advantages[e]` holds one number per transition of `episodes[e]`; a transition's advantage applies to all
    its response tokens. All transitions must be of `policy`. Raises NothingToLearn without any transition.
    """
    transitions = [t for episode in episodes for t in episode.transitions]
    if not transitions:
        raise NothingToLearn(
            "the batch is empty: no episode has a call of the policy. Check that the agent's model calls go "
            "to the gateway, and that the agent selector matches (`agl doctor`)"
        )
    strangers = {t.policy for t in transitions} - {policy}
    if strangers:
        raise InvalidInput(
            f"a batch updates one policy ({policy}), got calls of {sorted(strangers)}: select first"
        )
    rows = _all_rows(episodes, merge=merge)
    per_transition = np.concatenate([np.asarray(a, dtype=np.float32) for a in advantages])
    return _pack(rows, episodes, transitions, per_transition, policy, normalise)


def _all_rows(episodes: Sequence[Episode], *, merge: bool) -> list[_Row]:
    rows: list[_Row] = []
    first = 0
    for e, episode in enumerate(episodes):
        rows += _rows(episode.transitions, episode=e, first=first, merge=merge)
        first += len(episode.transitions)
    return rows


def _pack(
    rows: Sequence[_Row],
    episodes: Sequence[Episode],
    transitions: Sequence[Transition],
    advantages: Floats,
    policy: str,
    normalise: Normalise,
) -> Batch:
    offsets = np.cumsum([0, *(len(row.tokens) for row in rows)]).astype(np.int32)
    size = int(offsets[-1])
    index = np.full(size, -1, dtype=np.int32)
    old = np.zeros(size, dtype=np.float32)
    temperature = np.ones(size, dtype=np.float32)
    rewards = np.zeros(size, dtype=np.float32)
    earned = _earned(episodes)
    for row, offset in zip(rows, offsets, strict=False):
        for start, t in row.responses:
            span = slice(offset + start, offset + start + len(transitions[t].response_ids))
            index[span] = t
            old[span] = transitions[t].logprobs
            temperature[span] = transitions[t].temperature or 1.0
            rewards[span.stop - 1] = earned[t]
    mask = index >= 0
    group_of = {group: g for g, group in enumerate(dict.fromkeys(e.group_id for e in episodes))}
    weights = _weights(episodes, normalise)
    return Batch(
        token_ids=np.concatenate([np.asarray(row.tokens, dtype=np.int32) for row in rows]),
        row_offsets=offsets,
        response_mask=mask,
        old_logprobs=old,
        advantages=np.where(mask, advantages[index], 0).astype(np.float32),
        rewards=rewards,
        weights=np.where(mask, weights[index], 0).astype(np.float32),
        temperatures=temperature,
        transition_index=index,
        transition_episode=np.repeat(np.arange(len(episodes)), [len(e.transitions) for e in episodes]).astype(
            np.int32
        ),
        episode_group=np.array([group_of[e.group_id] for e in episodes], dtype=np.int32),
        policy_versions=np.array([t.policy_version for t in transitions], dtype=np.int32),
        policy=policy,
        transitions=len(transitions),
        episodes=len(episodes),
        unmerged_tokens=sum(len(t.prompt_ids) + len(t.response_ids) for t in transitions),
    )


def _earned(episodes: Sequence[Episode]) -> list[float]:
    """What each transition earned itself; the last of an episode earned the final reward too."""
    earned: list[float] = []
    for episode in episodes:
        earned += [transition.reward for transition in episode.transitions]
        if episode.transitions:
            earned[-1] += episode.final_reward or 0.0
    return earned


def _weights(episodes: Sequence[Episode], normalise: Normalise) -> Floats:
    """Loss weight of one response token, per transition [T]."""
    tokens = np.array([sum(len(t.response_ids) for t in e.transitions) for e in episodes], dtype=np.float64)
    counted = int((tokens > 0).sum())
    if normalise is Normalise.EPISODE:
        per_episode = 1.0 / (counted * np.maximum(tokens, 1))
    elif normalise is Normalise.TOKEN:
        per_episode = np.full(len(episodes), 1.0 / tokens.sum())
    else:
        per_episode = np.full(len(episodes), 1.0 / (counted * tokens.max()))
    return np.repeat(per_episode, [len(e.transitions) for e in episodes]).astype(np.float32)
