"""Agent runs: each `Runner.run` in any form, and each agent that it hands over to.

A run is one span, named by the agent that it starts with; the agents that are handed the conversation are
runs below it, so that one run is one trace. They are found by wrapping the runner and its turns, because the
SDK's own spans are missing where tracing is disabled and end without a word when a run is cancelled.

Invariant: what is open while a turn works is the run of the agent whose turn it is.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from agents.exceptions import InputGuardrailTripwireTriggered, MaxTurnsExceeded

from agentlightning import semconv
from agentlightning.context import SpanRef, open_span, restore_open_span, set_open_span, use_open_span
from agentlightning.tracing import SpanHandle, get_tracer
from agentlightning.tracing.genai import Where, start_agent
from agentlightning.tracing.guard import guarded
from agentlightning.tracing.process import end_with_error

SCOPE: Final = "agentlightning.openai_agents"


class Recording:
    """Who asked for runs to be recorded, to be told their rollout."""

    rollout_id: str | None = None
    """The rollout of the last run that started, for a reward that comes later.

    For an agent that runs by itself it is the live rollout of the run's trace. None before the first run, and
    when nothing is recorded. With several runs at once, `record()` each on its own.
    """


class _Process:
    recording: Recording | None = None


process: Final = _Process()
"""Holds the recording of `instrument()`, which every thread sees."""
scoped: Final[ContextVar[Recording | None]] = ContextVar("agentlightning_openai_agents_scope", default=None)
"""The recording of `record()`."""
_current: Final[ContextVar[Run | None]] = ContextVar("agentlightning_openai_agents_run", default=None)


class Run:
    """One run under way. It has no span until somebody records it."""

    __slots__ = ("agent_name", "before", "current", "outer", "path", "root")

    def __init__(self, agent_name: str, outer: Run | None) -> None:
        self.outer = outer
        self.agent_name = agent_name
        self.path = self._path()
        self.root: SpanHandle | None = None
        self.current: SpanHandle | None = None
        """The span of the agent at work: the root's, or that of the agent handed over to."""
        self.before: SpanRef | None = None

    def _path(self) -> str:
        outer = self.outer
        return self.agent_name if outer is None else f"{outer.path}/{self.agent_name}"

    @guarded
    def begin(self, recording: Recording) -> None:
        """Record this run, if that has not begun; the span is open in the calling context from here on."""
        if self.root is None:
            self._start()
        if self.root is not None and (self.outer is None or self.outer.root is None):
            recording.rollout_id = self.root.ref.rollout_id

    def _start(self) -> None:
        tracer = get_tracer()
        if not tracer.enabled:
            return
        self.before = open_span()
        self.root = self.current = start_agent(
            tracer, Where(SCOPE, node_path=self.path), self.before, name=self.agent_name
        )
        set_open_span(self.root.ref)

    @guarded
    def turn(self, agent_name: str) -> SpanRef | None:
        """The span of the agent whose turn it is."""
        if self.root is None or self.current is None:
            return None
        if agent_name != self.agent_name:
            self._hand_over(self.root, self.current, agent_name)
        return self.current.ref

    def _hand_over(self, root: SpanHandle, before: SpanHandle, agent_name: str) -> None:
        before.event("handoff", {semconv.AGENT_NAME: agent_name})
        if before is not root:
            before.end()
        self.agent_name = agent_name
        self.path = self._path()
        self.current = start_agent(get_tracer(), Where(SCOPE, node_path=self.path), root.ref, name=agent_name)

    @guarded
    def finish(self, error: BaseException | None = None) -> None:
        if self.root is None:
            return
        restore_open_span(self.root.ref, self.before)
        for span in dict.fromkeys((self.current, self.root)):
            if span is None:
                continue
            if error is None:
                span.end()
            else:
                end_with_error(span, error)


def current_run() -> Run | None:
    """The innermost run around the running code, recorded or not."""
    return _current.get()


def is_recording() -> bool:
    """Whether what happens here is recorded: its run is, or, outside of runs, everything is."""
    run = _current.get()
    return _recording() is not None if run is None else run.root is not None


def _recording() -> Recording | None:
    return scoped.get() or process.recording


def where() -> Where:
    """Who is at work here."""
    run = _current.get()
    if run is not None:
        return Where(SCOPE, run.agent_name, run.path)
    around = open_span()
    return Where(SCOPE, around.agent_name if around is not None else None)


@contextmanager
def _under_way(agent: Any) -> Generator[Run]:
    outer = _current.get()
    run = Run(str(getattr(agent, "name", "agent")), outer)
    _current.set(run)
    try:
        recording = _recording()
        if recording is not None:
            run.begin(recording)
        yield run
    except BaseException as error:
        run.finish(error)
        raise
    finally:
        _current.set(outer)
    run.finish()


def wrap_run(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`AgentRunner.run`, which `run_sync` calls too."""

    @functools.wraps(original)
    async def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _under_way(_argument(args, kwargs, 0, "starting_agent")):
            return await original(self, *args, **kwargs)

    return run


def wrap_start_streaming(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """What `run_streamed` runs in a task of its own."""

    @functools.wraps(original)
    async def start_streaming(*args: Any, **kwargs: Any) -> Any:
        with _under_way(_argument(args, kwargs, 2, "starting_agent")) as run:
            answer = await original(*args, **kwargs)
            error = _stopped_by(_argument(args, kwargs, 1, "streamed_result"))
            if error is not None:
                run.finish(error)
            return answer

    return start_streaming


@guarded
def _stopped_by(result: Any) -> BaseException | None:
    """What the reader of a stream is going to be told, where the loop itself just stops."""
    tripwire = getattr(result, "_triggered_input_guardrail_result", None)
    if tripwire is not None:
        return InputGuardrailTripwireTriggered(tripwire)
    limit: int | None = result.max_turns
    if limit is None or result.current_turn <= limit or result.final_output is not None:
        return None
    return MaxTurnsExceeded(f"Max turns ({limit}) exceeded")


def wrap_turn(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`run_single_turn` and `run_single_turn_streamed`: one answer of a model, and what it leads to."""

    @functools.wraps(original)
    async def turn(*args: Any, **kwargs: Any) -> Any:
        span = _turn_span(_argument(args, kwargs, 1, "bindings"))
        if span is None:
            return await original(*args, **kwargs)
        with use_open_span(span):
            return await original(*args, **kwargs)

    return turn


@guarded
def _turn_span(bindings: Any) -> SpanRef | None:
    run = _current.get()
    return None if run is None else run.turn(bindings.public_agent.name)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    return kwargs[name] if name in kwargs else args[index] if index < len(args) else None
