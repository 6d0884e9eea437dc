"""What VeRL logged and what rollouts came to -> the records that every run has, whatever its engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agentlightning.types import Mode, Task
from agentlightning_server.training.reporting import (
    EvalRecord,
    StepRecord,
    mean_and_stderr,
    tool_call_share,
)
from agentlightning_server.verl.collecting import Tally

ROLLOUT_S: Final = "timing_s/gen"
STEP_S: Final = "timing_s/step"


@dataclass(slots=True)
class VerlLog:
    """The file that VeRL's own "file" logger writes, read as it grows."""

    path: Path
    _read: int = 0

    def new(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """(step, metrics) of the lines that were completed since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                entry: Any = json.loads(line)
                yield int(entry["step"]), _numbers(entry["data"])


def _numbers(data: Mapping[str, Any]) -> dict[str, float]:
    numbers = {k: float(v) for k, v in data.items() if isinstance(v, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def step_record(tally: Tally, metrics: Mapping[str, float], policy: str) -> StepRecord:
    """A training step. VeRL counts steps from 1, and its version is the number of updates."""
    collected = tally.collected
    rollout_s = metrics.get(ROLLOUT_S, tally.seconds)
    return StepRecord(
        step=tally.step - 1,
        version=tally.step,
        versions={policy: tally.step},
        reward=collected.mean_reward,
        mean_return=collected.mean_return,
        episodes=len(collected.episodes),
        groups=tally.groups,
        mixed_groups=tally.mixed,
        tool_calls=tool_call_share(collected.episodes),
        sampled_tokens=tally.sampled_tokens,
        rollout_s=rollout_s,
        update_s=max(0.0, metrics.get(STEP_S, rollout_s) - rollout_s),
        problems=dict(collected.problems),
        update={name: value for name, value in metrics.items() if not name.startswith("val-")},
    )


def eval_record(tally: Tally, tasks: list[Task], policy: str) -> EvalRecord:
    """A validation: mean over the tasks, those that failed counting as 0."""
    rewards: dict[str, list[float]] = {task.id: [] for task in tasks}
    returns: dict[str, list[float]] = {task.id: [] for task in tasks}
    for episode in tally.collected.episodes:
        if episode.final_reward is not None and episode.task_id in rewards:
            rewards[episode.task_id].append(episode.final_reward)
            returns[episode.task_id].append(episode.total_return)
    samples = max(1, math.ceil(len(tally.collected.rollouts) / max(1, len(tasks))))
    by_task = {name: sum(values) / samples for name, values in rewards.items()}
    return_by_task = {name: sum(values) / samples for name, values in returns.items()}
    mean, stderr = mean_and_stderr(list(by_task.values()))
    mean_return, return_stderr = mean_and_stderr(list(return_by_task.values()))
    return EvalRecord(
        step=tally.step,
        version=tally.step,
        versions={policy: tally.step},
        reward=mean,
        stderr=stderr,
        mean_return=mean_return,
        return_stderr=return_stderr,
        tool_calls=tool_call_share(tally.collected.episodes),
        held_out=len(tasks),
        seconds=tally.seconds,
        rewards=by_task,
        returns=return_by_task,
        problems=dict(tally.collected.problems),
    )


def is_complete(tally: Tally, mode: Mode) -> bool:
    """Whether a step of this mode has all its rollouts."""
    return tally.mode is mode and not tally.open and tally.groups > 0
