"""The training loop of the embedded engine: collect, batch, update, checkpoint, evaluate.

On-policy and synchronous: a step's rollouts are sampled by the version that the update improves. Resume is
exact: the order of tasks follows from seed and step, rollout ids from run, step and task, and a checkpoint
holds all state of the engine; finished rollouts of an interrupted step are reused, unless it was
interrupted because nothing could be learned from them.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentlightning.bridge import Collected, LearningSettings, RolloutService, TrainerBridge, learnable_groups
from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.types import Batch, Episode, Limits, Mode, Task
from agentlightning_server.engines.base import Engine
from agentlightning_server.training.order import digest_of, tasks_of_step
from agentlightning_server.training.reporting import (
    EvalRecord,
    MetricsFile,
    Reporter,
    Retries,
    SilentReporter,
    StepRecord,
    check_identity,
    mean_and_stderr,
    read_object,
    tool_call_share,
    write_whole,
)
from agentlightning_server.training.updating import make_batches, update_policies

NO_DIFFERENCE = "no group had a difference to learn from: the policy stays as it is"


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How long and on how much a run trains."""

    run_id: str
    output: Path
    """Folder of the run: checkpoints, metrics, state."""
    steps: int = 10
    tasks_per_step: int = 8
    group_size: int = 8
    """Rollouts per task, compared with each other."""
    seed: int = 0
    eval_every: int = 0
    """Evaluate after every so many steps, besides before the first and after the last; 0 for never."""
    checkpoint_every: int = 5
    """Steps between checkpoints; steps since the last one are replayed from stored rollouts on resume."""
    learning: LearningSettings = field(default_factory=LearningSettings)
    learning_names: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The learning settings in words (`NamedLearning.to_json`), where they have any, for the run's file:
    `agl rescore` reads them there, and a run goes on with the same ones only."""
    policies: Sequence[str] = ()
    """Policies to train from the same episodes, each on its own calls; none for `learning.policy` alone."""
    max_rounds: int = 1
    """Above 1, a step whose groups all earned the same, or some of them, collects further tasks in up to
    so many rounds, and learns from groups with a difference only (DAPO's dynamic sampling,
    arXiv:2503.14476, section 3.2)."""
    max_flat_steps: int = 5
    """Steps in a row without a gradient, all rollouts of each group equal, before the run is given up."""
    limits: Limits = field(default_factory=Limits)
    step_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("tasks_per_step", "group_size", "checkpoint_every", "max_rounds", "max_flat_steps"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise InvalidInput(f"steps must be zero or more, got {self.steps}")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to, earlier parts of a resumed run included.

    `before` and `after` are None without held-out tasks.
    """

    steps: Sequence[StepRecord]
    before: EvalRecord | None
    after: EvalRecord | None
    checkpoint: Path | None


class Trainer:
    """Trains one or several policies of an engine on rollouts that workers run elsewhere."""

    def __init__(
        self,
        engine: Engine,
        service: RolloutService,
        settings: TrainSettings,
        reporter: Reporter | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._policies = tuple(settings.policies) or (settings.learning.policy,)
        self._reporter = reporter or SilentReporter()
        self._bridge = TrainerBridge(service, settings.run_id, settings.learning)
        settings.output.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(settings.output / "metrics.jsonl")
        self._retries = Retries(settings.output / "retries.json")
        self._flat_steps = 0
        self.watch: Callable[[], None] = lambda: None
        """Called about once a second while rollouts run; raises to end the run (a dead runner, say)."""

    def run(self, train: Sequence[Task], held_out: Sequence[Task] = ()) -> TrainResult:
        """Train from the last checkpoint, if there is one, to the last step.

        Raises NothingToLearn when a step's rollouts cannot be trained on.
        """
        settings = self._settings
        if settings.steps and not train:
            raise InvalidInput("there are no training tasks")
        check_identity(settings.output / "run.json", self._identity(train, held_out))
        start, checkpoint = self._resume()
        if start:
            self._reporter.resumed(start, settings.steps)
        before = self._evaluated(held_out, 0) if start == 0 else self._metrics.evaluation(0)
        for step in range(start, settings.steps):
            self._step(train, step)
            done = step + 1
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                checkpoint = self._save(done)
            if settings.eval_every and done % settings.eval_every == 0 and done < settings.steps:
                self._evaluated(held_out, done)
        after = self._evaluated(held_out, max(start, settings.steps)) if settings.steps else None
        return TrainResult(self._metrics.steps(), before, after, checkpoint)

    def _evaluated(self, tasks: Sequence[Task], step: int) -> EvalRecord | None:
        """The evaluation after `step` updates, also when an interrupted run had done it already."""
        if not tasks:
            return None
        return self._metrics.evaluation(step) or self.evaluate(tasks, step)

    def _identity(self, train: Sequence[Task], held_out: Sequence[Task]) -> dict[str, Any]:
        """What must stay the same for a run to be continued."""
        settings, learning = self._settings, self._settings.learning
        return {
            **settings.learning_names,
            "model": self._engine.base_model,
            "seed": settings.seed,
            "tasks": digest_of(train),
            **({"held_out": digest_of(held_out)} if held_out else {}),
            "tasks_per_step": settings.tasks_per_step,
            "group_size": settings.group_size,
            "policy": ", ".join(self._policies),
            "estimator": str(learning.estimator),
            "normalise": str(learning.normalisation),
        }

    def evaluate(self, tasks: Sequence[Task], step: int) -> EvalRecord:
        """Run every task once with the current policy and record the mean final reward.

        An episode that failed or got no reward counts as 0, so that a crash never flatters the mean.
        """
        self._reporter.phase("evaluate", step)
        began = time.monotonic()
        with self._given_up(Mode.VAL, step):
            collected = self._collect(tasks, step, group_size=1, mode=Mode.VAL)
        earned = {str(e.task_id): e for e in collected.episodes if e.final_reward is not None}
        rewards = {t.id: earned[t.id].final_reward or 0.0 if t.id in earned else 0.0 for t in tasks}
        returns = {t.id: earned[t.id].total_return if t.id in earned else 0.0 for t in tasks}
        mean, stderr = mean_and_stderr(list(rewards.values()))
        mean_return, return_stderr = mean_and_stderr(list(returns.values()))
        record = EvalRecord(
            step=step,
            version=self._version,
            versions=self._versions,
            reward=mean,
            stderr=stderr,
            mean_return=mean_return,
            return_stderr=return_stderr,
            tool_calls=tool_call_share(collected.episodes) * len(collected.episodes) / len(tasks),
            held_out=len(tasks),
            seconds=time.monotonic() - began,
            rewards=rewards,
            returns=returns,
            problems=dict(collected.problems),
        )
        self._metrics.write(record)
        self._reporter.evaluated(record)
        return record

    @property
    def _version(self) -> int:
        return self._engine.version(self._policies[0])

    @property
    def _versions(self) -> dict[str, int]:
        return {name: self._engine.version(name) for name in self._policies}

    @contextmanager
    def _given_up(self, mode: Mode, step: int) -> Generator[None]:
        """The next start runs the step anew when nothing can be learned from these rollouts."""
        try:
            yield
        except NothingToLearn:
            self._retries.add(mode, step)
            raise

    def _step(self, train: Sequence[Task], step: int) -> None:
        with self._given_up(Mode.TRAIN, step):
            record = self._stepped(train, step)
        self._metrics.write(record)
        self._reporter.stepped(record)

    def _stepped(self, train: Sequence[Task], step: int) -> StepRecord:
        self._reporter.phase("rollouts", step)
        began = time.monotonic()
        collected, mixed, groups = self._rollouts(train, step)
        rolled_out = time.monotonic()
        self._reporter.phase("update", step)
        learned_from = collected.learned_from or collected.episodes
        batches, without = make_batches(learned_from, self._settings.learning, self._policies)
        update = self._update(batches)
        return StepRecord(
            step=step,
            version=self._version,
            versions=self._versions,
            reward=collected.mean_reward,
            mean_return=collected.mean_return,
            episodes=len(collected.episodes),
            groups=groups,
            mixed_groups=mixed,
            tool_calls=tool_call_share(collected.episodes),
            sampled_tokens=sum(int(batch.response_mask.sum()) for batch in batches.values()),
            rollout_s=rolled_out - began,
            update_s=time.monotonic() - rolled_out,
            problems={**collected.problems, **without, **({} if update else {NO_DIFFERENCE: 1})},
            update={name: float(value) for name, value in update.items() if math.isfinite(value)},
        )

    def _rollouts(self, train: Sequence[Task], step: int) -> tuple[Collected, int, int]:
        """What the step learns from, the groups in it with a difference, and the groups that were run."""
        settings = self._settings
        rounds: list[Collected] = []
        kept: list[Episode] = []
        mixed = groups = 0
        while len(rounds) < settings.max_rounds and mixed < settings.tasks_per_step:
            collected = self._round(train, step, len(rounds))
            rounds.append(collected)
            learnable = learnable_groups(collected.episodes, settings.learning)
            mixed, groups = mixed + len(learnable.mixed), groups + learnable.groups
            kept += [e for e in collected.episodes if e.group_id in learnable.mixed]
        collected = Collected.joined(rounds)
        return (
            (replace(collected, learned_from=kept) if len(rounds) > 1 and kept else collected),
            mixed,
            groups,
        )

    def _round(self, train: Sequence[Task], step: int, round: int) -> Collected:
        """The rollouts of one round. A further one that comes to nothing leaves the step what it has."""
        settings = self._settings
        tasks = tasks_of_step(
            train, seed=settings.seed, step=step, count=settings.tasks_per_step, round=round
        )
        try:
            return self._collect(tasks, step, group_size=settings.group_size, mode=Mode.TRAIN, round=round)
        except NothingToLearn as problem:
            if not round:
                raise
            return Collected([], [], Counter([str(problem)]))

    def _update(self, batches: Mapping[str, Batch]) -> dict[str, float]:
        """Update each policy that has something to learn; too many steps in a row without one end the run."""
        metrics = update_policies(self._engine, batches, self._policies)
        if metrics:
            self._flat_steps = 0
            return metrics
        self._flat_steps += 1
        if self._flat_steps >= self._settings.max_flat_steps:
            raise NothingToLearn(
                f"in {self._flat_steps} steps in a row all rollouts of each group earned the same: there is "
                "no gradient. Put a worked example into the prompt, choose tasks of middling difficulty, "
                "enlarge the group, or reward progress (AIR, named rewards); `agl doctor` shows the records"
            )
        return {}

    def _collect(
        self, tasks: Sequence[Task], step: int, *, group_size: int, mode: Mode, round: int = 0
    ) -> Collected:
        return self._bridge.collect(
            tasks,
            step=step,
            group_size=group_size,
            mode=mode,
            round=round,
            version=self._version,
            limits=self._settings.limits,
            retry=self._retries.of(mode, step),
            timeout_s=self._settings.step_timeout_s,
            on_progress=self._progressed,
        )

    def _progressed(self, done: int, total: int) -> None:
        self._reporter.rollouts(done, total)
        if done < total:
            self.watch()

    def _save(self, done: int) -> Path:
        self._reporter.phase("checkpoint", done)
        folder = self._settings.output / "checkpoints" / f"step-{done:06d}"
        self._engine.save(folder)
        state = self._settings.output / "state.json"
        write_whole(state, json.dumps({"step": done, "checkpoint": folder.name}))
        for old in folder.parent.glob("step-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return folder

    def _resume(self) -> tuple[int, Path | None]:
        """(updates done, checkpoint) of the last complete checkpoint, loaded into the engine."""
        state = self._settings.output / "state.json"
        if not state.exists():
            return 0, None
        match read_object(state):
            case {"step": int(step), "checkpoint": str(name)}:
                folder = self._settings.output / "checkpoints" / name
            case _:
                raise InvalidInput(f"{state} is damaged: restore it, or choose another output folder")
        self._engine.load(folder)
        return step, folder
