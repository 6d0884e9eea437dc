"""What a training run tells the world while it goes on: metrics as JSON lines, and a `Reporter` to watch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

from agentlightning.errors import InvalidInput
from agentlightning.types import Episode, Mode

Phase = Literal["evaluate", "rollouts", "update", "checkpoint"]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step. `reward` is the mean final reward, `mean_return` has the intermediate ones too."""

    step: int
    version: int
    """Policy version after the update."""
    reward: float
    mean_return: float
    episodes: int
    groups: int
    mixed_groups: int
    """Groups whose returns differ; the others carry no gradient."""
    tool_calls: float
    """Share of episodes with at least one tool call that succeeded."""
    sampled_tokens: int
    rollout_s: float
    update_s: float
    problems: Mapping[str, int] = field(default_factory=dict[str, int])
    update: Mapping[str, float] = field(default_factory=dict[str, float])
    """Metrics of the update; with several policies, each name begins with the policy's and a slash."""
    versions: Mapping[str, int] = field(default_factory=dict[str, int])
    """Version of each trained policy after the step."""


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """One evaluation on held-out tasks, sampled at the agent's own temperature.

    `reward` is the mean final reward; `mean_return` adds the intermediate rewards.
    """

    step: int
    version: int
    reward: float
    stderr: float
    """Standard error of the mean reward over tasks."""
    mean_return: float
    return_stderr: float
    tool_calls: float
    held_out: int
    seconds: float
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    """Final reward by task id."""
    returns: Mapping[str, float] = field(default_factory=dict[str, float])
    """Return by task id."""
    problems: Mapping[str, int] = field(default_factory=dict[str, int])
    versions: Mapping[str, int] = field(default_factory=dict[str, int])
    """Version of each trained policy."""


class Reporter(Protocol):
    """Watches a run. Calls come from the training thread."""

    def resumed(self, done: int, steps: int) -> None: ...
    def phase(self, phase: Phase, step: int) -> None: ...
    def rollouts(self, done: int, total: int) -> None: ...
    def stepped(self, record: StepRecord) -> None: ...
    def evaluated(self, record: EvalRecord) -> None: ...


class SilentReporter:
    """Watches nothing."""

    def resumed(self, done: int, steps: int) -> None: ...
    def phase(self, phase: Phase, step: int) -> None: ...
    def rollouts(self, done: int, total: int) -> None: ...
    def stepped(self, record: StepRecord) -> None: ...
    def evaluated(self, record: EvalRecord) -> None: ...


class MetricsFile:
    """Appends records to `metrics.jsonl`; a step that is done again after a crash replaces its old line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: StepRecord | EvalRecord) -> None:
        kind = "step" if isinstance(record, StepRecord) else "eval"
        line = {"kind": kind, **asdict(record)}
        kept = [row for row in self.read() if (row["kind"], row["step"]) != (kind, record.step)]
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in [*kept, line]))

    def evaluation(self, step: int) -> EvalRecord | None:
        """The evaluation after `step` updates, if it was written."""
        for row in self.read():
            if row.pop("kind") == "eval" and row["step"] == step:
                return self._record(EvalRecord, row)
        return None

    def steps(self) -> list[StepRecord]:
        """All training steps of the run, in order."""
        rows = [row for row in self.read() if row.pop("kind") == "step"]
        return sorted((self._record(StepRecord, row) for row in rows), key=lambda record: record.step)

    def read(self) -> list[dict[str, Any]]:
        """The records as they stand in the file. Raises InvalidInput when one is damaged."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        rows = [_object_in(self._path, line) for line in lines]
        if not all({"kind", "step"} <= row.keys() for row in rows):
            raise _damaged(self._path, "a line is no record")
        return rows

    def _record(self, kind: type[R], row: dict[str, Any]) -> R:
        try:
            return kind(**row)
        except TypeError as error:
            raise _damaged(self._path, error) from error


class Retries:
    """How often each step's rollouts were given up, in `retries.json`.

    What nothing could be learned from is not taken again by the next start, once the agent is mended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, mode: Mode, step: int) -> int:
        """Times that the step's rollouts were given up."""
        return int(self._read().get(f"{mode}.{step}", 0))

    def add(self, mode: Mode, step: int) -> None:
        """Give up the step's rollouts."""
        counts = {**self._read(), f"{mode}.{step}": self.of(mode, step) + 1}
        write_whole(self._path, json.dumps(counts) + "\n")

    def _read(self) -> dict[str, Any]:
        return read_object(self._path) if self._path.exists() else {}


def check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Write what a run is, or compare with what was written. Raises InvalidInput naming the differences."""
    if not path.exists():
        write_whole(path, json.dumps(identity, indent=1) + "\n")
        return
    written = read_object(path)
    changed = [name for name, value in identity.items() if name in written and written[name] != value]
    if changed:
        listed = ", ".join(f"{name} was {written.get(name)}, now {identity[name]}" for name in changed)
        raise InvalidInput(
            f"{path.parent} holds another run ({listed}): choose another output folder, or delete this one"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InvalidInput naming the file when it is damaged."""
    return _object_in(path, path.read_text(encoding="utf-8", errors="replace"))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _object_in(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(value, dict):
        raise _damaged(path, f"it holds {text.strip():.40}, not an object")
    return cast("dict[str, Any]", value)


def _damaged(path: Path, reason: object) -> InvalidInput:
    return InvalidInput(f"{path} is damaged ({reason}): restore it, or choose another output folder")


def tool_call_share(episodes: Sequence[Episode]) -> float:
    """Share of episodes with at least one tool call that ran and succeeded."""
    good = sum(any(tool.status == "ok" for tool in episode.tool_calls) for episode in episodes)
    return good / len(episodes) if episodes else 0.0


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN without values, 0 error with one."""
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
