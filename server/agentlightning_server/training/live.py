"""Learning from live use: agents that run by themselves, rewarded whenever somebody says how it went.

There are no groups of the same task here, so the rollouts of one update are compared with each other: their
mean reward is the baseline (REINFORCE with a batch baseline, scaled by the standard deviation as in GRPO).
Rollouts sampled by an older policy count until they are `max_lag` updates old; the clipped ratio against the
recorded logprobs corrects for the difference. A rollout is used once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentlightning.bridge import LearningSettings, counts, deciding_attempt
from agentlightning.errors import AgentLightningError
from agentlightning.learning import apply_air
from agentlightning.reading import read_episode
from agentlightning.types import Episode, Mode, Rollout
from agentlightning_server.engines.base import Engine
from agentlightning_server.store import RolloutFilter, Store
from agentlightning_server.training.reporting import StepRecord, tool_call_share
from agentlightning_server.training.updating import make_batches, update_policies

logger = logging.getLogger(__name__)

PAGE = 200  # rollouts read from the store at a time
STATE = "live"  # id of the run state that remembers which rollouts were used


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """When to learn from live rollouts."""

    output: Path
    """Folder for checkpoints."""
    batch_size: int = 32
    """Rewarded rollouts per update."""
    max_lag: int = 4
    """Updates after which a rollout is too old to learn from."""
    reward_wait_s: float = 3600.0
    """How long after its end a rollout may still get its reward."""
    poll_s: float = 2.0
    checkpoint_every: int = 5
    learning: LearningSettings = field(default_factory=LearningSettings)
    policies: Sequence[str] = ()
    """Policies to train, each on its own calls; none for `learning.policy` alone."""


class LiveTrainer:
    """Watches a store for rewarded live rollouts and updates the policy with every full batch of them."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        settings: LiveSettings,
        on_update: Callable[[StepRecord], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._settings = settings
        self._policies = tuple(settings.policies) or (settings.learning.policy,)
        self._on_update = on_update
        self._stop = threading.Event()
        self._checkpoint = settings.output / "checkpoints" / "live"
        state: dict[str, Any] = store.run(STATE) or {"used": [], "after": None, "updates": 0}
        self._used: set[str] = set(state["used"])
        self._after: str | None = state["after"]
        """Everything up to this rollout was used or given up."""
        self._updates = int(state["updates"])
        self._saved_updates = self._updates
        self._noted: str | None = None
        if self._checkpoint.exists():
            engine.load(self._checkpoint)

    def run(self) -> None:
        """Learn until `stop`; an update that fails is logged and its rollouts are not tried again."""
        self._note()  # also tells retention that what is not used yet is needed
        while not self._stop.wait(self._settings.poll_s):
            self._learn()
            if self._updates == self._saved_updates and self._after != self._noted:
                self._note()
        self.save()

    def _learn(self) -> None:
        try:
            while not self._stop.is_set() and self.step() is not None:
                pass
        except AgentLightningError as error:
            logger.warning("no update from live rollouts: %s", error)
        except Exception:  # a full disk, say: learning goes on when it can
            logger.exception("no update from live rollouts")

    def stop(self) -> None:
        """End `run` after what it is doing."""
        self._stop.set()

    def step(self) -> StepRecord | None:
        """One update if enough rewarded rollouts wait, else None."""
        ready: list[Episode] = []
        for episode in self._rewarded():
            ready.append(episode)
            if len(ready) == self._settings.batch_size:
                return self._update(ready)
        return None

    def _rewarded(self) -> Iterator[Episode]:
        """Unused live episodes with a reward and fresh enough calls, oldest first."""
        for rollout in self._unused():
            episode = self._episode(rollout)
            if episode is None:
                continue
            lag = self._lag(episode)
            if lag is None or lag > self._settings.max_lag:
                self._used.add(rollout.id)
            elif episode.final_reward is not None:
                yield episode
            elif time.time_ns() - (rollout.ended_ns or 0) > self._settings.reward_wait_s * 1e9:
                self._used.add(rollout.id)

    def _lag(self, episode: Episode) -> int | None:
        """Updates since the episode's oldest call of a policy that learns; None without such a call."""
        calls = [t for t in episode.transitions if t.policy in self._policies]
        return max((self._engine.version(t.policy) - t.policy_version for t in calls), default=None)

    def _unused(self) -> Iterator[Rollout]:
        after = self._after
        contiguous = True
        while True:
            page = self._store.rollouts(RolloutFilter(mode=Mode.LIVE, limit=PAGE, after=after))
            for rollout in page:
                after = rollout.id
                if rollout.id not in self._used:
                    contiguous = False
                    if counts(rollout):
                        yield rollout
                elif contiguous:
                    self._after = rollout.id
                    self._used.discard(rollout.id)
            if len(page) < PAGE:
                return

    def _episode(self, rollout: Rollout) -> Episode | None:
        attempt = deciding_attempt(self._store.attempts(rollout.id))
        if attempt is None:
            return None
        learning = self._settings.learning
        try:
            episode = read_episode(
                rollout, attempt, self._store.spans(rollout.id), reward_weights=learning.reward_weights
            )
        except AgentLightningError as error:
            logger.warning("live rollout %s cannot be read: %s", rollout.id, error)
            self._used.add(rollout.id)
            return None
        return apply_air(episode, learning.air) if learning.air else episode

    def _update(self, episodes: list[Episode]) -> StepRecord:
        self._used.update(episode.rollout_id for episode in episodes)
        group = [replace(episode, group_id=STATE) for episode in episodes]
        batches, _ = make_batches(group, self._settings.learning, self._policies)
        metrics = update_policies(self._engine, batches, self._policies)
        self._updates += 1
        if self._updates % self._settings.checkpoint_every == 0:
            self.save()
        rewards = [episode.final_reward or 0.0 for episode in episodes]
        record = StepRecord(
            step=self._updates - 1,
            version=self._engine.version(self._policies[0]),
            versions={name: self._engine.version(name) for name in self._policies},
            reward=sum(rewards) / len(rewards),
            mean_return=sum(episode.total_return for episode in episodes) / len(episodes),
            episodes=len(episodes),
            groups=1,
            mixed_groups=int(bool(metrics)),
            tool_calls=tool_call_share(episodes),
            sampled_tokens=sum(int(batch.response_mask.sum()) for batch in batches.values()),
            rollout_s=0.0,
            update_s=sum(value for name, value in metrics.items() if name.endswith("seconds")),
            update=metrics,
        )
        self._on_update(record)
        return record

    def save(self) -> None:
        """Write the checkpoint and what it was learned from; a kill makes the rest be learned again."""
        if not self._updates:
            return
        self._engine.save(self._checkpoint)
        self._note()

    def _note(self) -> None:
        """Remember how far this has come; only while the checkpoint has all that was learned."""
        self._store.set_run(
            STATE, {"used": sorted(self._used), "after": self._after, "updates": self._updates}
        )
        self._noted, self._saved_updates = self._after, self._updates
