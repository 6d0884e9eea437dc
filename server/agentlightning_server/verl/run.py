"""A whole run on VeRL: the server in this process, the runner beside it, VeRL and vLLM in Ray.

The counterpart of `training.local` for the embedded engine, with the same records, resume and errors. The
store and the server outlive VeRL: what runners finished while it failed is there when the run goes on.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentlightning.errors import AgentLightningError, InvalidInput, NothingToLearn
from agentlightning.types import Mode, Task
from agentlightning_server.settings import Settings
from agentlightning_server.store import Scope
from agentlightning_server.training.local import RunnerSettings, Served, local_runner, served
from agentlightning_server.training.order import digest_of
from agentlightning_server.training.reporting import (
    MetricsFile,
    Reporter,
    Retries,
    SilentReporter,
    check_identity,
    read_object,
)
from agentlightning_server.training.trainer import TrainResult, TrainSettings
from agentlightning_server.verl.bridge import Status
from agentlightning_server.verl.collecting import Plan, Tally
from agentlightning_server.verl.config import VerlFile, compose, environment, placed_for
from agentlightning_server.verl.engine import VerlEngine
from agentlightning_server.verl.launch import launched
from agentlightning_server.verl.reading import VerlLog, eval_record, is_complete, step_record

NO_VALIDATION = [Task("none", None, "val")]  # VeRL wants a data set even where it never validates


def train_on_verl(
    runner: RunnerSettings | None,
    training: TrainSettings,
    file: VerlFile,
    *,
    model: str,
    train: Sequence[Task],
    held_out: Sequence[Task] = (),
    reporter: Reporter | None = None,
    server: Settings | None = None,
    announce: Callable[[Served], None] | None = None,
) -> TrainResult:
    """Train an agent's policy on VeRL; without a `runner`, on runners that connect from elsewhere.

    An existing run in `training.output` goes on from its last checkpoint.
    """
    if not train:
        raise InvalidInput("there are no training tasks")
    training.output.mkdir(parents=True, exist_ok=True)
    check_identity(training.output / "run.json", _identity(training, model, train, held_out))
    job = _Job(training, file, model, list(train), list(held_out), reporter or SilentReporter())
    os.environ.update(job.environment())  # VeRL reads some of it when it is imported, by `compose` first
    config = job.config()
    engine = gateway_engine(config, model, training.learning.policy)
    settings = replace(
        server or Settings(port=0), database=training.output / "store.db", model=training.learning.policy
    )
    with served(engine, settings) as up:
        if announce is not None:
            announce(up)
        with _runner(runner, up, training.output / "runner.log") as check:
            job.train(config, engine, up, check)
    return job.result()


@contextmanager
def _runner(runner: RunnerSettings | None, up: Served, log: Path) -> Generator[Callable[[], None]]:
    if runner is None:
        yield lambda: None
        return
    with (
        up.store.temporary_key(Scope.RUNNER, "the runner beside the server") as key,
        local_runner(up.url, key, runner, log) as check,
    ):
        yield check


def _identity(
    training: TrainSettings, model: str, train: Sequence[Task], held_out: Sequence[Task]
) -> dict[str, Any]:
    """What must stay the same for a run to be continued."""
    return {
        **training.learning_names,
        "engine": "verl",
        "model": model,
        "seed": training.seed,
        "tasks": digest_of(train),
        **({"held_out": digest_of(held_out)} if held_out else {}),
        "tasks_per_step": training.tasks_per_step,
        "group_size": training.group_size,
        "policy": training.learning.policy,
        "estimator": str(training.learning.estimator),
        "normalise": str(training.learning.normalisation),
    }


def gateway_engine(config: Any, model: str, policy: str) -> VerlEngine:
    """The gateway's engine; its tokenizer is the model's own."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot load the tokenizer of {model}: {error}") from error
    try:
        ends: Any = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    return VerlEngine(
        tokenizer,
        base_model=model,
        policy=policy,
        context_length=int(config.actor_rollout_ref.rollout.max_model_len),
        eos_ids=frozenset({*ends, tokenizer.eos_token_id}),
    )


@dataclass(slots=True)
class _Job:
    """One run: its settings, and what of it was reported."""

    training: TrainSettings
    file: VerlFile
    model: str
    tasks: list[Task]
    held_out: list[Task]
    reporter: Reporter
    _reported: set[tuple[Mode, int]] = field(default_factory=set[tuple[Mode, int]])
    _logged: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])
    log: VerlLog = field(init=False)
    _seen: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # A file for each start: VeRL's logger begins its own anew.
        self.log = VerlLog(self.training.output.resolve() / f"verl-{time.time_ns() // 10**9}.jsonl")

    def environment(self) -> dict[str, str]:
        return environment(self.file, self.log.path)

    def config(self) -> Any:
        from agentlightning_server.verl.dataset import write_tasks

        output, seed = self.training.output.resolve(), self.training.seed
        return compose(
            self.file,
            self.training,
            model=self.model,
            train_tasks=write_tasks(output / "train_tasks.json", self.tasks, seed=seed),
            val_tasks=write_tasks(output / "val_tasks.json", self.held_out or NO_VALIDATION, seed=None),
            validates=bool(self.held_out),
        )

    def train(self, config: Any, engine: VerlEngine, up: Served, check: Callable[[], None]) -> None:
        with launched(
            config,
            self._plan(config, engine),
            engine,
            url=up.url,
            key=up.key,
            environment=self.environment(),
            stall_s=self.file.own.stall_s,
        ) as run:
            run.begin(config)
            last: list[Status] = []

            def look(status: Status) -> float:
                check()
                last[:] = [status]
                return self._look(status)

            try:
                run.watch(look)
            except NothingToLearn:
                self._give_up(last)
                raise
            if last and last[0].error:
                raise AgentLightningError(last[0].error)

    def _plan(self, config: Any, engine: VerlEngine) -> Plan:
        retries = self.training.output / "retries.json"
        return Plan(
            run_id=self.training.run_id,
            learning=self.training.learning,
            group_size=self.training.group_size,
            eos_id=engine.tokenizer.eos_token_id,
            temperature=float(config.actor_rollout_ref.rollout.temperature),
            placed=placed_for(config),
            limits=self.training.limits,
            step_timeout_s=self.file.own.step_timeout_s,
            max_flat_steps=self.training.max_flat_steps,
            retries=read_object(retries) if retries.exists() else {},
        )

    def _look(self, status: Status) -> float:
        """Report what is new; seconds since something was."""
        for step, metrics in self.log.new():
            self._logged[step] = {**self._logged.get(step, {}), **metrics}
            self._seen = time.monotonic()
        for tally in status.tallies:
            self._report(tally)
        if status.tallies:
            last = status.tallies[-1]
            total = len(last.collected.rollouts) + status.open
            self.reporter.phase("evaluate" if last.mode is Mode.VAL else "rollouts", last.step)
            self.reporter.rollouts(total - status.open, total)
        return time.monotonic() - self._seen

    def _report(self, tally: Tally) -> None:
        """A validation when its rollouts have ended, a step when VeRL has logged its update."""
        key = tally.mode, tally.step
        if key in self._reported or not is_complete(tally, tally.mode):
            return
        metrics = MetricsFile(self.training.output / "metrics.jsonl")
        policy = self.training.learning.policy
        if tally.mode is Mode.VAL:
            evaluated = eval_record(tally, self.held_out, policy)
            metrics.write(evaluated)
            self.reporter.evaluated(evaluated)
        elif tally.step in self._logged:
            stepped = step_record(tally, self._logged[tally.step], policy)
            metrics.write(stepped)
            self.reporter.stepped(stepped)
        else:
            return
        self._reported.add(key)

    def _give_up(self, last: Sequence[Status]) -> None:
        """The next start runs the step anew, as with the embedded engine."""
        if last and last[0].tallies:
            tally = last[0].tallies[-1]
            Retries(self.training.output / "retries.json").add(tally.mode, tally.step)

    def result(self) -> TrainResult:
        metrics = MetricsFile(self.training.output / "metrics.jsonl")
        return TrainResult(
            metrics.steps(),
            metrics.evaluation(0),
            metrics.evaluation(self.training.steps),
            newest_checkpoint(self.training.output),
        )


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint that VeRL would go on from; `actor/huggingface` in it is an ordinary model folder."""
    tracker = output / "checkpoints" / "latest_checkpointed_iteration.txt"
    return tracker.parent / f"global_step_{tracker.read_text().strip()}" if tracker.exists() else None
