"""The progress display of a run in the terminal; plain lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from agentlightning_server.training.reporting import EvalRecord, Phase, StepRecord

PHASES: dict[Phase, str] = {
    "evaluate": "evaluating on held-out tasks",
    "rollouts": "running the agent",
    "update": "updating the policy",
    "checkpoint": "saving a checkpoint",
}


def versions_of(record: StepRecord | EvalRecord) -> str:
    """The policy's version after a step; of several policies each, by name."""
    if len(record.versions) < 2:
        return str(record.version)
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())


class ProgressReporter:
    """Shows where a run is, with reward, tokens per second and time left. Writes to standard error."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._steps = steps
        self._console = console or Console(stderr=True)
        self._began = time.monotonic()
        self._first_step: float | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def resumed(self, done: int, steps: int) -> None:
        rest = (
            "going on from there"
            if done < steps
            else "nothing to do: raise the steps, or choose another folder"
        )
        self._console.print(
            f"this run has done {done} of {steps} steps; {rest}", highlight=False, soft_wrap=True
        )

    def phase(self, phase: Phase, step: int) -> None:
        if phase == "rollouts" and self._first_step is None:
            self._first_step = time.monotonic()
        where = "" if phase == "evaluate" else f"step {min(step + 1, self._steps)}/{self._steps}: "
        self._progress.reset(self._task, total=None, description=f"{where}{PHASES[phase]}")

    def rollouts(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def stepped(self, record: StepRecord) -> None:
        speed = record.sampled_tokens / max(record.rollout_s, 1e-9)
        self._console.print(
            f"step {record.step + 1:>3}/{self._steps}  reward {record.reward:.3f}  "
            f"return {record.mean_return:.3f}  tool calls {record.tool_calls:.2f}  "
            f"mixed groups {record.mixed_groups}/{record.groups}  version {versions_of(record)}  "
            f"{speed:.0f} tok/s  "
            f"rollouts {record.rollout_s:.1f} s  update {record.update_s:.1f} s  "
            f"left {self._left(record.step + 1)}",
            highlight=False,
            soft_wrap=True,
        )
        self._show_problems(record.problems)

    def evaluated(self, record: EvalRecord) -> None:
        self._console.print(
            f"held out, policy version {versions_of(record)}: "
            f"reward {record.reward:.3f} ± {1.96 * record.stderr:.3f}  "
            f"return {record.mean_return:.3f} ± {1.96 * record.return_stderr:.3f}  "
            f"tool calls {record.tool_calls:.2f}  ({record.held_out} tasks, {record.seconds:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )
        self._show_problems(record.problems)

    def _show_problems(self, problems: Mapping[str, int]) -> None:
        for sentence, count in problems.items():
            self._console.print(
                f"  [yellow]warning:[/] {count} x {escape(sentence)}", highlight=False, soft_wrap=True
            )

    def _left(self, done: int) -> str:
        if self._first_step is None:
            return "?"
        seconds = (time.monotonic() - self._first_step) / done * (self._steps - done)
        return f"{seconds / 60:.1f} min"
