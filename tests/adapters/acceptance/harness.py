"""The acceptance matrix: four frameworks x five ways to run an agent x ten things that happen to it.

Real agents of a real framework ask our real server, whose engine is scripted; what is read back from the
store must be what happened. A framework takes part with a `Driver` (drive_<framework>.py): it builds the
agent of each case. Cells that a framework cannot have are in its `skips`, with the reason, which its README
states.

What a case expects is in `EXPECTED`, the same for all frameworks; where a framework's agent itself goes on
differently (it raises where others tell the model), the driver overrides the entry.

To add a framework: write drive_<framework>.py with a `DRIVER`, and name it in test_matrix.py.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tests.adapters.recorded import comparable
from tests.support.scripted_engine import STALL, ScriptedEngine, tool_call
from tests.support.serving import serving, tiny_engine
from tests.support.waiting import wait_until

from agentlightning import semconv
from agentlightning.client import LightningClient
from agentlightning.context import ActiveRollout, open_span, use_rollout
from agentlightning.errors import Unavailable
from agentlightning.reading import read_episode, read_trace
from agentlightning.tracing import configure, get_tracer
from agentlightning.tracing.guard import failures
from agentlightning.types import AttemptStatus, Claim, Episode, Rollout, Span, SpanStatus, Task, ToolStatus

TEMPERATURE = 0.5
"""What every model of the matrix asks for, to see that parameters are recorded."""


class Way(StrEnum):
    """How the agent is run."""

    SYNC = "sync"
    ASYNC = "async"
    STREAM = "stream"
    THREADS = "threads"
    """Three agents at once, each in a thread of a plain pool."""
    CONCURRENT = "concurrent"
    """Two rollouts that a server gave out, at once in one event loop."""


class Case(StrEnum):
    """What happens to it."""

    OK = "ok"
    TOOL_RAISES = "tool raises"
    UNKNOWN_TOOL = "unknown tool"
    BAD_ARGUMENTS = "bad arguments"
    LLM_500 = "LLM 500"
    RETRIED = "429 then ok"
    CANCELLED = "cancelled"
    STRUCTURED = "structured output"
    NESTED = "nested agent"
    HANDOFF = "handoff"


SCRIPTS: Mapping[Case, Callable[[], list[Any]]] = {
    Case.OK: lambda: [tool_call("add", a=1, b=2), "three"],
    Case.TOOL_RAISES: lambda: [tool_call("boom", x="q"), "sorry"],
    Case.UNKNOWN_TOOL: lambda: [tool_call("nope"), "sorry"],
    Case.BAD_ARGUMENTS: lambda: [tool_call("add", a="z"), "sorry"],
    Case.LLM_500: lambda: [RuntimeError("the engine broke")],
    Case.RETRIED: lambda: [Unavailable("busy", retry_after_s=0.001), "fine"],
    Case.CANCELLED: lambda: [STALL],
    Case.STRUCTURED: lambda: ['{"a": 1}'],
    Case.NESTED: lambda: [tool_call("helper", task="ask"), "inner says", "outer says"],
    Case.HANDOFF: lambda: [tool_call("transfer_to_b"), "b says"],
}
"""What the engine says in each case. A driver may say it in its framework's words."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the episode of one run must hold."""

    agents: Sequence[str]
    """The agent of each answered call, in order."""
    tools: Sequence[tuple[str, ToolStatus]] = ()
    runs: Sequence[str] = ("calc",)
    """The agents that ran, in order of their starts."""
    failed_calls: int = 0
    raises: bool = False
    """Whether the run ends with an exception that the user sees."""


EXPECTED: Mapping[Case, Expected] = {
    Case.OK: Expected(["calc", "calc"], [("add", ToolStatus.OK)]),
    Case.TOOL_RAISES: Expected(["calc", "calc"], [("boom", ToolStatus.RAISED)]),
    Case.UNKNOWN_TOOL: Expected(["calc", "calc"], [("nope", ToolStatus.UNKNOWN_TOOL)]),
    Case.BAD_ARGUMENTS: Expected(["calc", "calc"], [("add", ToolStatus.BAD_ARGUMENTS)]),
    Case.LLM_500: Expected([], failed_calls=1, raises=True),
    Case.RETRIED: Expected(["calc"]),
    Case.CANCELLED: Expected([], failed_calls=1, raises=True),
    Case.STRUCTURED: Expected(["calc"]),
    Case.NESTED: Expected(
        ["outer", "helper", "outer"], [("helper", ToolStatus.OK)], runs=("outer", "helper")
    ),
    Case.HANDOFF: Expected(["a", "b"], [("transfer_to_b", ToolStatus.OK)], runs=("a", "b")),
}


class Agent(Protocol):
    """An agent ready to run once. What it returns is not looked at, what it raises is."""

    def run(self) -> object: ...
    async def arun(self) -> object: ...
    async def astream(self) -> object:
        """Run it with the model's answers streamed, to the end of the stream."""
        ...


class Driver(Protocol):
    """A framework's part of the matrix."""

    @property
    def name(self) -> str: ...
    @property
    def readme(self) -> Path:
        """The adapter's README, which states the reasons of `skips`."""
        ...

    @property
    def skips(self) -> Mapping[tuple[Way | None, Case | None], str]:
        """Cells that do not exist, with the reason; None stands for every way or every case."""
        ...

    @property
    def expected(self) -> Mapping[Case, Expected]:
        """Where this framework's agents go on differently."""
        ...

    @property
    def scripts(self) -> Mapping[Case, Callable[[], list[Any]]]:
        """Where the model must say it in the framework's own words."""
        ...

    def instrument(self) -> None: ...
    def uninstrument(self) -> None: ...
    def agent(self, case: Case, stage: Stage, model: str) -> Agent:
        """The case's agent, whose every call asks `model` with TEMPERATURE. Tools are `add` and `boom`; the
        SDK retries twice in case RETRIED and else never."""
        ...


# --- the stage -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Stage:
    """A server whose model is scripted, and this process as its agent."""

    engine: ScriptedEngine
    client: LightningClient
    url: str
    key: str = field(repr=False)
    loop: asyncio.Runner
    """One event loop for all cells, as in a runner's process: frameworks keep HTTP clients across runs."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def openai(self) -> dict[str, Any]:
        """What an OpenAI client needs."""
        return {"base_url": f"{self.url}/v1", "api_key": self.key}

    def model(self, script: Sequence[Any]) -> str:
        """A new model name that answers this."""
        name = f"m{next(self._numbers)}"
        self.engine.script[name].extend(script)
        return name

    def claims(self, count: int) -> list[Claim]:
        """Rollouts that the server gave out."""
        names = [f"given-{next(self._numbers)}" for _ in range(count)]
        self.client.enqueue([Rollout(name, Task(name, {}), group_id=name) for name in names])
        return list(self.client.claim("matrix", count))

    def rollout_ids(self) -> set[str]:
        ids: list[str] = []
        while page := self.client.rollouts(after=ids[-1] if ids else None):
            ids += [rollout.id for rollout in page]
        return set(ids)

    def served(self, rollout_id: str) -> bool:
        """Whether the gateway has stored what it knows; for a cancelled call that takes a moment."""
        return any(_is_served(span) for span in self.client.spans(rollout_id))

    def record(self, rollout_id: str) -> tuple[Episode, Sequence[Span]]:
        rollout, attempts = self.client.rollout(rollout_id)
        spans = self.client.spans(rollout_id)
        return read_episode(rollout, attempts[-1], spans), spans


@contextmanager
def staged(folder: Path, tracer: Any) -> Generator[Stage]:
    """One server for many cells."""
    engine = ScriptedEngine(tiny_engine(folder, context_length=8192))
    with serving(engine, folder) as server:  # type: ignore[arg-type]
        configure(server.url, server.key, tracer)
        with LightningClient(server.url, server.key) as client, asyncio.Runner() as loop:
            try:
                yield Stage(engine, client, server.url, server.key, loop)
            finally:
                configure("")


# --- a cell --------------------------------------------------------------------------------------


def skip_reason(driver: Driver, way: Way, case: Case) -> str | None:
    """Why there is no such cell."""
    for key in ((way, case), (way, None), (None, case)):
        if key in driver.skips:
            return driver.skips[key]
    if case is Case.CANCELLED and way in (Way.SYNC, Way.THREADS):
        return "synchronous code cannot be cancelled"
    return None


def play(driver: Driver, way: Way, case: Case, stage: Stage) -> None:
    """Run the cell's agents and check what was recorded of each."""
    script = driver.scripts.get(case) or SCRIPTS[case]
    count = {Way.THREADS: 3, Way.CONCURRENT: 2}.get(way, 1)
    models = [stage.model(script()) for _ in range(count)]
    before, failed_before = stage.rollout_ids(), sum(failures.values())
    outcomes, given = _RUNS[way](driver, case, stage, models)
    expected = driver.expected.get(case) or EXPECTED[case]
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not expected.raises:
            raise outcome
        assert isinstance(outcome, BaseException) == expected.raises, outcome
    assert get_tracer().flush(10)
    assert get_tracer().dropped == 0
    assert sum(failures.values()) == failed_before, failures
    assert open_span() is None
    rollout_ids = [claim.rollout.id for claim in given] or sorted(stage.rollout_ids() - before)
    assert len(rollout_ids) == count, f"one run is one rollout: {rollout_ids}"
    remaining = set(models)
    for rollout_id in rollout_ids:
        wait_until(partial(stage.served, rollout_id))
        episode, spans = stage.record(rollout_id)
        asked = {str(span.attributes[semconv.REQUEST_MODEL]) for span in spans if _is_served(span)}
        assert len(asked) == 1, f"rollout {rollout_id} holds calls of {asked}"
        remaining -= asked
        check(expected, episode, spans, stage.engine.sampled[asked.pop()])
    assert not remaining


def _is_served(span: Span) -> bool:
    return span.scope == semconv.SCOPE_GATEWAY


def check(expected: Expected, episode: Episode, spans: Sequence[Span], sampled: Sequence[Any]) -> None:
    """The episode holds what happened, no more and no less."""
    assert not episode.untrainable
    assert [
        (t.prompt_ids.tolist(), t.response_ids.tolist(), [round(float(p), 4) for p in t.logprobs])
        for t in episode.transitions
    ] == [(p, r, [round(x, 4) for x in lp]) for p, r, lp in sampled]
    assert [t.agent_name for t in episode.transitions] == list(expected.agents)
    assert [(call.name, call.status) for call in episode.tool_calls] == list(expected.tools)
    assert [run.name for run in episode.agent_runs] == list(expected.runs)
    lost = [call for call in episode.calls if call.error is not None]
    assert len(lost) == expected.failed_calls
    assert len(episode.calls) == len(expected.agents) + expected.failed_calls
    for tool in episode.tool_calls:
        assert (tool.error is None) == (tool.status is ToolStatus.OK)
        assert tool.agent_name in expected.runs
        assert tool.status is not ToolStatus.OK or tool.result is not None
    if expected.raises:
        assert any(run.error for run in episode.agent_runs)
    _check_adapter(spans)


def _check_adapter(spans: Sequence[Span]) -> None:
    """Each answered request has exactly one span of the adapter, which says what the gateway saw."""
    trace = read_trace(spans)
    by_id = {call.span_id: call for call in trace.adapter_calls}
    raw = {span.span_id: span for span in spans}
    answered = [call for call in trace.gateway_calls if call.error is None]
    assert sorted(call.parent_id or "" for call in answered) == sorted(
        call.span_id for call in trace.adapter_calls if call.error is None
    )
    for served in answered:
        caller = by_id[served.parent_id or ""]
        assert comparable(list(caller.messages)) == comparable(list(served.messages))
        assert [_name(tool) for tool in caller.tools] == [_name(tool) for tool in served.tools]
        assert caller.response_id in (None, served.response_id)
        assert caller.finish_reason in (None, served.finish_reason)
        assert (caller.input_tokens, caller.output_tokens) in (
            (None, None),
            (served.input_tokens, served.output_tokens),
        )
        assert caller.temperature == served.temperature == TEMPERATURE
        assert raw[caller.span_id].status is not SpanStatus.ERROR


def _name(tool: Any) -> object:
    return tool.get("function", tool).get("name")


# --- the ways ------------------------------------------------------------------------------------

Outcomes = tuple[list[object], list[Claim]]


def _outcome(run: Callable[[], object]) -> object:
    try:
        return run()
    except (Exception, asyncio.CancelledError) as error:
        return error


async def _awaited(case: Case, stage: Stage, model: str, run: Callable[[], Awaitable[object]]) -> object:
    """Run it, and cancel it once its request has arrived where the case says so."""
    task = asyncio.ensure_future(run())
    if case is Case.CANCELLED:
        while model not in stage.engine.stalled and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    return outcome


def _sync(driver: Driver, case: Case, stage: Stage, models: Sequence[str]) -> Outcomes:
    return [_outcome(driver.agent(case, stage, model).run) for model in models], []


def _async(driver: Driver, case: Case, stage: Stage, models: Sequence[str]) -> Outcomes:
    async def main() -> list[object]:
        return [await _awaited(case, stage, model, driver.agent(case, stage, model).arun) for model in models]

    return stage.loop.run(main()), []


def _stream(driver: Driver, case: Case, stage: Stage, models: Sequence[str]) -> Outcomes:
    async def main() -> list[object]:
        return [
            await _awaited(case, stage, model, driver.agent(case, stage, model).astream) for model in models
        ]

    return stage.loop.run(main()), []


def _threads(driver: Driver, case: Case, stage: Stage, models: Sequence[str]) -> Outcomes:
    def work(model: str) -> object:
        if (Way.SYNC, None) in driver.skips:
            return _outcome(lambda: asyncio.run(_main(model)))
        return _outcome(driver.agent(case, stage, model).run)

    async def _main(model: str) -> object:
        return await driver.agent(case, stage, model).arun()

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(work, models)), []


def _concurrent(driver: Driver, case: Case, stage: Stage, models: Sequence[str]) -> Outcomes:
    claims = stage.claims(len(models))

    async def one(claim: Claim, model: str) -> object:
        active = ActiveRollout(claim.rollout.id, claim.attempt.id, base_url=f"{stage.url}/v1")
        with use_rollout(active):
            return await _awaited(case, stage, model, driver.agent(case, stage, model).arun)

    async def main() -> list[object]:
        return list(await asyncio.gather(*map(one, claims, models)))

    outcomes = stage.loop.run(main())
    assert get_tracer().flush(10)  # before the attempts end, and their keys with them
    for claim in claims:
        wait_until(partial(stage.served, claim.rollout.id))
        stage.client.finish(claim.attempt.id, "matrix", AttemptStatus.SUCCEEDED)
    return outcomes, claims


_RUNS: Mapping[Way, Callable[[Driver, Case, Stage, Sequence[str]], Outcomes]] = {
    Way.SYNC: _sync,
    Way.ASYNC: _async,
    Way.STREAM: _stream,
    Way.THREADS: _threads,
    Way.CONCURRENT: _concurrent,
}
