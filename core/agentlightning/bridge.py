"""The trainer bridge: what every trainer shares, whatever engine computes and wherever rollouts run.

`collect` turns tasks into finished rollouts and their spans into episodes; `batch` turns episodes into token
rows. It talks to the store through `RolloutService`, in process or over HTTP, and knows no engine.
Rollout ids follow from (run, step, task, sample), so collecting a step again after a crash reuses whatever
had finished; another `retry` collects the step anew.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.learning.advantages import Estimator, StepGroups, advantages_of
from agentlightning.learning.air import AIR, apply_air
from agentlightning.learning.batching import Normalise, build_batch
from agentlightning.learning.credit import Credit, identical
from agentlightning.learning.selection import Selector, select
from agentlightning.reading import read_episode
from agentlightning.types import (
    Attempt,
    AttemptStatus,
    Batch,
    Episode,
    Limits,
    Mode,
    Rollout,
    RolloutStatus,
    Span,
    Task,
)

if TYPE_CHECKING:
    from agentlightning.types import Floats

WAIT_S = 10.0  # one long poll; progress is reported at least this often


class RolloutService(Protocol):
    """The part of the store that a trainer needs. Implemented by the store and by the HTTP client."""

    def enqueue(self, rollouts: Sequence[Rollout]) -> None: ...
    def wait(self, rollout_ids: Sequence[str], timeout_s: float) -> Sequence[Rollout]:
        """Those of the rollouts that are final; returns when all are, or at the timeout."""
        ...

    def attempts(self, rollout_id: str) -> Sequence[Attempt]: ...
    def spans(self, rollout_id: str) -> Sequence[Span]: ...
    def cancel(self, rollout_ids: Sequence[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """How episodes become a batch."""

    policy: str = "policy"
    air: AIR | None = None
    """Rules for intermediate rewards; None leaves only the rewards that were given."""
    select: Selector | None = None
    """Which transitions train; None trains all calls of the policy."""
    credit: Credit = identical
    estimator: Estimator = Estimator.GRPO
    by_agent: bool = False
    """Compare each agent's calls with that agent's calls only."""
    steps: StepGroups | None = None
    """Compare calls made in the same state with each other as well (GiGPO); None for whole episodes only."""
    normalise: Normalise | None = None
    """None: per episode, or constant for Dr. GRPO."""
    reward_weights: Mapping[str, float] | None = None
    merge: bool = True

    @property
    def normalisation(self) -> Normalise:
        if self.normalise is not None:
            return self.normalise
        return Normalise.CONSTANT if self.estimator is Estimator.DR_GRPO else Normalise.EPISODE


@dataclass(frozen=True, slots=True)
class Collected:
    """Finished rollouts of one step. `problems` counts what could not be used, by sentence."""

    episodes: Sequence[Episode]
    rollouts: Sequence[Rollout]
    problems: Counter[str] = field(default_factory=Counter[str])
    learned_from: Sequence[Episode] = ()
    """The episodes to learn from, where some were left out on purpose; none for all."""

    @classmethod
    def joined(cls, rounds: Sequence[Collected]) -> Collected:
        """Several rounds as one."""
        return cls(
            [episode for part in rounds for episode in part.episodes],
            [rollout for part in rounds for rollout in part.rollouts],
            sum((part.problems for part in rounds), Counter[str]()),
        )

    @property
    def mean_reward(self) -> float:
        """Mean final reward of the episodes that have one; NaN when none has."""
        rewards = [e.final_reward for e in self.episodes if e.final_reward is not None]
        return sum(rewards) / len(rewards) if rewards else float("nan")

    @property
    def mean_return(self) -> float:
        """As `mean_reward`, with the intermediate rewards."""
        returns = [e.total_return for e in self.episodes if e.final_reward is not None]
        return sum(returns) / len(returns) if returns else float("nan")


class TrainerBridge:
    """Collects rollouts for one training run and turns them into batches."""

    def __init__(
        self, service: RolloutService, run_id: str, learning: LearningSettings | None = None
    ) -> None:
        self._service = service
        self.run_id = run_id
        self.learning = learning or LearningSettings()

    def collect(
        self,
        tasks: Sequence[Task],
        *,
        step: int,
        group_size: int = 1,
        mode: Mode = Mode.TRAIN,
        version: int | None = None,
        limits: Limits | None = None,
        retry: int = 0,
        round: int = 0,
        timeout_s: float = 3600.0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Collected:
        """Run every task `group_size` times and read the episodes of those that ended.

        Blocks until all rollouts are final. Failed rollouts are counted in `problems`; at `timeout_s` the
        rest is cancelled. Another `round` of a step has rollouts of its own. Raises NothingToLearn when none
        can be used.
        """
        again = (f".retry{retry}" if retry else "") + (f".round{round}" if round else "")
        rollouts = self.rollouts(
            tasks, f"{step}{again}", group_size=group_size, mode=mode, version=version, limits=limits
        )
        self._service.enqueue(rollouts)
        ended = self._await([r.id for r in rollouts], timeout_s, on_progress)
        by_id = {r.id: r for r in ended}
        problems: Counter[str] = Counter()
        episodes: list[Episode] = []
        for rollout in (by_id[r.id] for r in rollouts if r.id in by_id):
            episode = self.episode(rollout, problems)
            if episode is not None:
                episodes.append(episode)
        if len(by_id) < len(rollouts):
            problems[f"rollout cancelled after {timeout_s:g} s"] += len(rollouts) - len(by_id)
        if not episodes:
            raise NothingToLearn(_nothing(problems))
        return Collected(episodes, list(ended), problems)

    def batch(self, episodes: Sequence[Episode]) -> Batch:
        """`make_batch` with this run's settings."""
        return make_batch(episodes, self.learning)

    def rollouts(
        self,
        tasks: Sequence[Task],
        step: str,
        *,
        group_size: int,
        mode: Mode,
        version: int | None = None,
        limits: Limits | None = None,
        first: int = 0,
    ) -> list[Rollout]:
        """A group of rollouts for each task, the first task at position `first` of its step."""
        if group_size < 1:
            raise InvalidInput(f"group_size must be at least 1, got {group_size}")
        rollouts: list[Rollout] = []
        for position, task in enumerate(tasks, first):
            group = f"{self.run_id}.{mode}.{step}.{position}"  # `update_of` reads it
            for sample in range(group_size):
                rollouts.append(
                    Rollout(
                        id=f"{group}.{sample}",
                        task=task,
                        group_id=group,
                        mode=mode,
                        policy_version=version,
                        limits=limits or Limits(),
                        run_id=self.run_id,
                        created_ns=time.time_ns(),
                    )
                )
        return rollouts

    def _await(
        self, ids: Sequence[str], timeout_s: float, on_progress: Callable[[int, int], None] | None
    ) -> Sequence[Rollout]:
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            ended = self._service.wait(ids, max(0.0, min(left, 1.0 if on_progress else WAIT_S)))
            if on_progress is not None:
                on_progress(len(ended), len(ids))
            if len(ended) == len(ids):
                return ended
            if left <= 0:
                done = {rollout.id for rollout in ended}
                self._service.cancel([i for i in ids if i not in done])
                return ended

    def episode(self, rollout: Rollout, problems: Counter[str]) -> Episode | None:
        """What a rollout that has ended came to; None, with the reason in `problems`, for one of no use."""
        attempt = deciding_attempt(self._service.attempts(rollout.id))
        if rollout.status is not RolloutStatus.SUCCEEDED or attempt is None:
            problems[_last_line(attempt.error if attempt else None) or f"rollout {rollout.status}"] += 1
            return None
        try:
            episode = read_episode(
                rollout,
                attempt,
                self._service.spans(rollout.id),
                reward_weights=self.learning.reward_weights,
            )
        except InvalidInput as error:  # its spans or rewards cannot be used: the others still can
            problems[str(error)] += 1
            return None
        for sentence in episode.untrainable:
            problems[sentence.split(": ", 1)[-1]] += 1
        if episode.final_reward is None:
            problems["no final reward was given"] += 1
        if not episode.transitions:
            problems["no call of the policy was recorded"] += 1
        return apply_air(episode, self.learning.air) if self.learning.air else episode


def make_batch(episodes: Sequence[Episode], learning: LearningSettings) -> Batch:
    """Select, assign credit, compare within groups, pack.

    Episodes without a final reward are left out. Raises NothingToLearn for an empty batch or a selector that
    matches no call.
    """
    usable = usable_episodes(episodes, learning)
    return build_batch(
        usable,
        advantages(usable, learning),
        policy=learning.policy,
        normalise=learning.normalisation,
        merge=learning.merge,
    )


def usable_episodes(episodes: Sequence[Episode], learning: LearningSettings) -> list[Episode]:
    """The rewarded episodes with the calls that train, and no others.

    Raises NothingToLearn for a selector that matches no call, and where no episode with calls has a reward.
    """
    own = [select(e, lambda t: t.policy == learning.policy) for e in episodes]
    chosen = own if learning.select is None else [select(e, learning.select) for e in own]
    if any(e.transitions for e in own) and not any(e.transitions for e in chosen):
        agents = sorted({str(t.agent_name) for e in own for t in e.transitions})
        raise NothingToLearn(f"the agent selector matches no call; agents seen: {', '.join(agents)}")
    usable = [e for e in chosen if e.transitions and e.final_reward is not None]
    if not usable and any(e.transitions for e in chosen):
        raise NothingToLearn(
            "no episode that called the policy has a final reward: return a number from the agent function, "
            "or call emit_reward(value)"
        )
    return usable


def advantages(episodes: Sequence[Episode], learning: LearningSettings) -> list[Floats]:
    """One array per episode, shaped like its transitions."""
    return advantages_of(
        episodes, learning.credit, learning.estimator, by_agent=learning.by_agent, steps=learning.steps
    )


_GROUP = re.compile(r"(?P<step>.+\.train\.\d+)(?:\.retry(?P<retry>\d+))?(?:\.round\d+)?\.\d+")


def update_of(group_id: str) -> tuple[str, int]:
    """The update that a group of `TrainerBridge.collect` was for, and the retry of its step.

    Groups of anything else, live rollouts say, are all for the one update "".
    """
    match = _GROUP.fullmatch(group_id)
    return (match["step"], int(match["retry"] or 0)) if match else ("", 0)


def counts(rollout: Rollout) -> bool:
    """Whether a rollout can be learned from: it succeeded, or somebody's own run ended with an exception.

    A rollout that a worker ran and that failed is retried and then given up, for its agent is broken. A live
    one ended as it ended, and a reward for that is the lesson.
    """
    failed_live = rollout.mode is Mode.LIVE and rollout.status is RolloutStatus.FAILED
    return rollout.status is RolloutStatus.SUCCEEDED or failed_live


def deciding_attempt(attempts: Sequence[Attempt]) -> Attempt | None:
    """The attempt that counts: the one that succeeded, else the latest; None when there was none."""
    good = [a for a in attempts if a.status is AttemptStatus.SUCCEEDED]
    return max(good or attempts, key=lambda a: a.number, default=None)


@dataclass(frozen=True, slots=True)
class Learnable:
    """Ids of the groups with a difference to learn from, and the number of all: the rest has no gradient."""

    mixed: frozenset[str]
    groups: int


def learnable_groups(episodes: Sequence[Episode], learning: LearningSettings) -> Learnable:
    """Which groups have a gradient, before any selection of agents.

    Whitening after a group baseline, which moves every advantage, makes no group differ.
    """
    if learning.estimator is Estimator.REINFORCE_PP_BASELINE:
        learning = replace(learning, estimator=Estimator.GRPO_NO_STD)
    rewarded = [e for e in episodes if e.final_reward is not None and e.transitions]
    mixed = frozenset(
        episode.group_id
        for episode, own in zip(rewarded, advantages(rewarded, learning), strict=True)
        if own.any()
    )
    return Learnable(mixed, len({episode.group_id for episode in rewarded}))


def _last_line(error: str | None) -> str | None:
    lines = [line for line in (error or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else None


def _nothing(problems: Counter[str]) -> str:
    reasons = "; ".join(f"{sentence} ({count}x)" for sentence, count in problems.most_common(3))
    return f"no rollout can be used: {reasons or 'no worker took one, is a runner connected?'}"
