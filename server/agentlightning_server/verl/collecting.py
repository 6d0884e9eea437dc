"""VeRL's prompts -> rollouts in our store -> rows, group by group, as runners end them.

Not here: VeRL's types and Ray (`bridge`, `transfer`). Nothing blocks: `submit` queues, `poll` looks once. Ids
of rollouts follow from run, step and the task's position in the data, so a step that is begun again after a
crash takes the rollouts that had ended. Invariant: every group that was submitted is finished in the sink
exactly once, with rows or as a failure, and at the latest when its time is over.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from agentlightning.bridge import Collected, LearningSettings, RolloutService, TrainerBridge
from agentlightning.errors import NotFound
from agentlightning.types import Episode, Limits, Mode, Rollout, Task
from agentlightning_server.verl.rows import Placed, Row, failed_row, make_rows


@dataclass(frozen=True, slots=True)
class Plan:
    """What the collector has to know of a run."""

    run_id: str
    learning: LearningSettings
    group_size: int
    eos_id: int
    temperature: float = 1.0
    """The one temperature at which VeRL computes log-probabilities."""
    placed: Placed = Placed.RETURN
    limits: Limits = field(default_factory=Limits)
    step_timeout_s: float = 3600.0
    max_flat_steps: int = 5
    """As `TrainSettings` has it."""
    retries: Mapping[str, int] = field(default_factory=dict[str, int])
    """How often a step was given up, by "mode.step"; its rollouts are then run anew."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task that VeRL wants rollouts of. `key` is its name in VeRL, `position` its place in the data."""

    key: str
    position: int
    task: Task


class Sink(Protocol):
    """Where groups go."""

    def begin(self, keys: Sequence[str], mode: Mode) -> None: ...
    def put(self, rows: Mapping[str, Row], mode: Mode, step: int) -> None:
        """Rows by their names, KEY_SAMPLE_INDEX."""
        ...

    def finish(self, key: str, mode: Mode, *, failed: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Tally:
    """What the rollouts of one step came to. Complete when nothing is `open`."""

    mode: Mode
    step: int
    collected: Collected
    groups: int = 0
    mixed: int = 0
    """Groups with an advantage."""
    open: int = 0
    sampled_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Group:
    key: str
    mode: Mode
    step: int
    rollouts: Sequence[Rollout]
    deadline: float


class Collector:
    """Keeps the groups that are under way. Used by one thread at a time."""

    def __init__(self, service: RolloutService, plan: Plan, sink: Sink) -> None:
        self._service = service
        self._plan = plan
        self._sink = sink
        self._bridge = TrainerBridge(service, plan.run_id, plan.learning)
        self._groups: list[_Group] = []
        self._final: dict[str, Rollout] = {}
        self._tallies: dict[tuple[Mode, int], Tally] = {}
        self._began: dict[tuple[Mode, int], float] = {}

    @property
    def open(self) -> int:
        """Rollouts under way."""
        return sum(len(group.rollouts) for group in self._groups) - len(self._final)

    @property
    def tallies(self) -> Sequence[Tally]:
        """Every step so far, in the order in which they were begun."""
        return list(self._tallies.values())

    @property
    def flat_steps(self) -> int:
        """Training steps in a row, the last complete ones, without a difference to learn from."""
        count = 0
        for tally in reversed(self.tallies):
            if tally.mode is Mode.TRAIN and not tally.open:
                if tally.mixed:
                    break
                count += 1
        return count

    def submit(self, prompts: Sequence[Prompt], *, mode: Mode, step: int, group_size: int) -> None:
        """Queue a group of rollouts for each prompt."""
        retry = self._plan.retries.get(f"{mode}.{step}", 0)
        name = f"{step}.retry{retry}" if retry else str(step)
        version = step if mode is Mode.VAL else step - 1
        deadline = time.monotonic() + self._plan.step_timeout_s
        groups = [
            _Group(
                prompt.key,
                mode,
                step,
                self._bridge.rollouts(
                    [prompt.task],
                    name,
                    group_size=group_size,
                    mode=mode,
                    version=version,
                    limits=self._plan.limits,
                    first=prompt.position,
                ),
                deadline,
            )
            for prompt in prompts
        ]
        self._sink.begin([group.key for group in groups], mode)
        self._service.enqueue([rollout for group in groups for rollout in group.rollouts])
        self._groups += groups
        self._began.setdefault((mode, step), time.monotonic())
        tally = self._tally(mode, step)
        self._tallies[mode, step] = replace(tally, open=tally.open + len(groups))

    def poll(self, timeout_s: float) -> None:
        """Wait a little for rollouts to end, and hand over the groups that are complete."""
        waiting = [r.id for g in self._groups for r in g.rollouts if r.id not in self._final]
        if waiting:
            self._final |= {rollout.id: rollout for rollout in self._service.wait(waiting, timeout_s)}
        for group in list(self._groups):
            late = time.monotonic() > group.deadline
            if late or all(rollout.id in self._final for rollout in group.rollouts):
                self._groups.remove(group)
                self._close(group)

    def _close(self, group: _Group) -> None:
        problems: Counter[str] = Counter()
        ended = [self._final.pop(r.id) for r in group.rollouts if r.id in self._final]
        self._give_up([r.id for r in group.rollouts if r.id not in {e.id for e in ended}], problems)
        episodes = [e for e in (self._episode(rollout, problems) for rollout in ended) if e is not None]
        rows = self._rows(group, episodes)
        named = _named(group, rows)
        if named:
            self._sink.put(named, group.mode, group.step)
        self._sink.finish(group.key, group.mode, failed=not named)
        self._count(group, Collected(episodes, ended, problems), rows)

    def _give_up(self, ids: Sequence[str], problems: Counter[str]) -> None:
        for rollout_id in ids:
            problems[f"rollout cancelled after {self._plan.step_timeout_s:g} s"] += 1
            try:
                self._service.cancel([rollout_id])
            except NotFound:
                continue

    def _episode(self, rollout: Rollout, problems: Counter[str]) -> Episode | None:
        """The episode, without calls at another temperature than VeRL's, which it would take for its own."""
        episode = self._bridge.episode(rollout, problems)
        if episode is None or rollout.mode is Mode.VAL:
            return episode
        wanted = self._plan.temperature
        same = [t for t in episode.transitions if abs(t.temperature - wanted) < 1e-3]
        if left_out := len(episode.transitions) - len(same):
            asked = f"a call at another temperature than VeRL's rollout.temperature ({wanted:g})"
            problems[f"{asked} is not trained on"] += left_out
        return replace(episode, transitions=same)

    def _rows(self, group: _Group, episodes: Sequence[Episode]) -> list[Row]:
        if group.mode is Mode.TRAIN:
            return make_rows(episodes, self._plan.learning, self._plan.placed) if episodes else []
        rewarded = [e for e in episodes if e.final_reward is not None]
        rows = make_rows(rewarded, self._plan.learning, Placed.FINAL) if rewarded else []
        missing = [r.id for r in group.rollouts if r.id not in {row.rollout_id for row in rows}]
        return rows + [failed_row(name, self._plan.eos_id, group.step) for name in missing]

    def _count(self, group: _Group, collected: Collected, rows: Sequence[Row]) -> None:
        key = group.mode, group.step
        tally = self._tallies[key]
        self._tallies[key] = replace(
            tally,
            collected=Collected.joined([tally.collected, collected]),
            groups=tally.groups + 1,
            mixed=tally.mixed + int(any(row.advantages.any() for row in rows)),
            open=tally.open - 1,
            sampled_tokens=tally.sampled_tokens + sum(int(row.response_mask.sum()) for row in rows),
            seconds=time.monotonic() - self._began[key],
        )

    def _tally(self, mode: Mode, step: int) -> Tally:
        return self._tallies.setdefault((mode, step), Tally(mode, step, Collected([], [])))


def _named(group: _Group, rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by VeRL's names for them: the prompt's key, the sample's number, the row's number in it."""
    samples = {rollout.id: number for number, rollout in enumerate(group.rollouts)}
    seen: Counter[str] = Counter()
    named: dict[str, Row] = {}
    for row in rows:
        named[f"{group.key}_{samples[row.rollout_id]}_{seen[row.rollout_id]}"] = row
        seen[row.rollout_id] += 1
    return named
