"""What recorded episodes would have taught under other learning settings: returns and advantages, per call.

Pure functions over episodes as they were read, without AIR: nothing is run, no engine is asked. Calls are
compared with those of the same update, as in training: the updates of a run follow from the ids of its
groups; groups with other ids are taken as one update. Rollouts that a run gave up and collected again do not
count. What this cannot know is which groups dynamic sampling left out: they have no difference, so only
estimators that whiten a whole batch could tell.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentlightning.bridge import (
    LearningSettings,
    advantages,
    counts,
    deciding_attempt,
    learnable_groups,
    update_of,
    usable_episodes,
)
from agentlightning.doctor import Recorded
from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.learning import apply_air
from agentlightning.reading import read_episode
from agentlightning.types import Episode, Mode, Transition

if TYPE_CHECKING:
    from agentlightning.types import Floats

CallId = tuple[str, int]
"""Rollout, and number of the transition in it."""
POSITIVE = 1e-6  # an advantage above this pulls the policy towards the call


@dataclass(frozen=True, slots=True)
class Worth:
    """What one call is worth under one choice of settings."""

    returned: float
    advantage: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The calls of one agent under one choice of settings. Means are 0 without a call."""

    calls: int
    mean_return: float
    mean_advantage: float
    positive: float
    """Share of the calls with a positive advantage."""

    @classmethod
    def of(cls, worths: Sequence[Worth]) -> Summary:
        """Of these calls."""
        count = max(len(worths), 1)
        return cls(
            len(worths),
            sum(w.returned for w in worths) / count,
            sum(w.advantage for w in worths) / count,
            sum(w.advantage > POSITIVE for w in worths) / count,
        )


@dataclass(frozen=True, slots=True)
class Rescored:
    """Something under the old settings and under the new ones."""

    before: Summary
    after: Summary


@dataclass(frozen=True, slots=True)
class RescoredCall:
    """One call. None where it does not train."""

    rollout_id: str
    number: int
    """Of the policy's calls in its rollout, from 0."""
    span_id: str
    agent_name: str | None
    policy: str
    before: Worth | None
    after: Worth | None


@dataclass(frozen=True, slots=True)
class Rescoring:
    """What changes by agent, by call and by group."""

    agents: Mapping[str, Rescored]
    calls: Sequence[RescoredCall]
    groups: int
    mixed_before: int
    """Groups with a difference to learn from."""
    mixed_after: int


@dataclass(slots=True)
class Scores:
    """What the calls of all updates are worth under one choice of settings."""

    calls: dict[CallId, Worth] = field(default_factory=dict[CallId, Worth])
    mixed: int = 0


def rescore(
    episodes: Sequence[Episode],
    before: LearningSettings,
    after: LearningSettings,
    policies: Sequence[str] | None = None,
) -> Rescoring:
    """Compare two choices of settings on the same episodes, which must come without AIR's rewards.

    `policies` are those that train; all that were called where left out. Raises NothingToLearn where nothing
    can be learned under one of the settings, for the reason it would give in training.
    """
    groups = {episode.group_id for episode in episodes if episode.final_reward is not None}
    old, new = score(episodes, before, policies), score(episodes, after, policies)
    calls = [
        _call(episode, number, transition, old, new)
        for episode in episodes
        for number, transition in enumerate(episode.transitions)
    ]
    calls = [call for call in calls if call.before is not None or call.after is not None]
    return Rescoring(_by_agent(calls), calls, len(groups), old.mixed, new.mixed)


def score(
    episodes: Sequence[Episode], learning: LearningSettings, policies: Sequence[str] | None = None
) -> Scores:
    """Returns and advantages of all calls that train, update by update."""
    shaped = [apply_air(e, learning.air) if learning.air else e for e in episodes]
    places = {id(t): (e.rollout_id, i) for e in shaped for i, t in enumerate(e.transitions)}
    called = sorted({t.policy for e in shaped for t in e.transitions})
    trained = [policy for policy in called if policies is None or policy in policies]
    scores = Scores()
    problems: list[NothingToLearn] = []
    mixed: set[str] = set()
    for update in _updates(shaped):
        for policy in trained or [learning.policy]:
            own = replace(learning, policy=policy)
            try:
                usable = usable_episodes(update, own)
            except NothingToLearn as problem:
                problems.append(problem)
                continue
            mixed |= learnable_groups(usable, own).mixed
            worths = _worths(usable, [learning.credit(e) for e in usable], advantages(usable, own))
            scores.calls |= {places[id(transition)]: worth for transition, worth in worths}
    if not scores.calls:
        raise problems[0] if problems else NothingToLearn("no call of a policy that trains was recorded")
    scores.mixed = len(mixed)
    return scores


def _updates(episodes: Iterable[Episode]) -> Iterator[list[Episode]]:
    updates: defaultdict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        updates[update_of(episode.group_id)[0]].append(episode)
    yield from updates.values()


def _worths(
    episodes: Sequence[Episode], returns: Sequence[Floats], gained: Sequence[Floats]
) -> Iterator[tuple[Transition, Worth]]:
    for episode, earned, own in zip(episodes, returns, gained, strict=True):
        for transition, returned, advantage in zip(episode.transitions, earned, own, strict=True):
            yield transition, Worth(float(returned), float(advantage))


def _call(episode: Episode, number: int, transition: Transition, old: Scores, new: Scores) -> RescoredCall:
    place = (episode.rollout_id, number)
    return RescoredCall(
        episode.rollout_id,
        number,
        transition.span_id,
        transition.agent_name,
        transition.policy,
        old.calls.get(place),
        new.calls.get(place),
    )


def _by_agent(calls: Sequence[RescoredCall]) -> dict[str, Rescored]:
    agents = sorted({call.agent_name or "" for call in calls})
    return {
        agent: Rescored(
            Summary.of([c.before for c in calls if c.before is not None and (c.agent_name or "") == agent]),
            Summary.of([c.after for c in calls if c.after is not None and (c.agent_name or "") == agent]),
        )
        for agent in agents
    }


# --- what is stored ------------------------------------------------------------------------------


def training_episodes(recorded: Iterable[Recorded]) -> tuple[list[Episode], Counter[str]]:
    """The episodes that a run learned from, and why others cannot be used, by sentence.

    Where there are no training rollouts, the live ones, all in one group as live learning compares them.
    """
    episodes: defaultdict[Mode, list[Episode]] = defaultdict(list)
    problems: Counter[str] = Counter()
    for record in recorded:
        if record.rollout.mode is Mode.VAL:
            continue
        try:
            episodes[record.rollout.mode].append(read_recorded(record))
        except InvalidInput as problem:
            problems[str(problem)] += 1
    live = [replace(episode, group_id="live") for episode in episodes[Mode.LIVE]]
    return _kept(episodes[Mode.TRAIN]) or live, problems


def read_recorded(record: Recorded) -> Episode:
    """Its episode, without AIR's rewards. Raises InvalidInput for a rollout that did not succeed."""
    attempt = deciding_attempt(record.attempts)
    if attempt is None or not counts(record.rollout):
        raise InvalidInput(f"rollout {record.rollout.status}")
    return read_episode(record.rollout, attempt, record.spans)


def _kept(episodes: Sequence[Episode]) -> list[Episode]:
    """Without the rollouts of steps that were given up and collected again."""
    last: dict[str, int] = {}
    for episode in episodes:
        step, retry = update_of(episode.group_id)
        last[step] = max(retry, last.get(step, 0))
    return [e for e in episodes if update_of(e.group_id)[1] == last[update_of(e.group_id)[0]]]
