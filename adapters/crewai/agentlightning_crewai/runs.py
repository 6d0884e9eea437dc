"""Runs of crews, agents and flows: what is a run, its name, and its place in what runs around it.

One kickoff is one trace: the outermost run opens it, runs inside are its children. Entry points of CrewAI
call each other, so a run of something that is at work already is that same run going on.

Invariant: a run that fails ends what is still open under it. CrewAI works in threads, which a cancellation or
a timeout does not stop; what they still do belongs to the trace of the run that they are left over from.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from weakref import WeakSet

from crewai.utilities.agent_utils import is_inside_event_loop

from agentlightning.context import SpanRef, open_span, use_open_span
from agentlightning.tracing import SpanHandle, get_tracer
from agentlightning.tracing.genai import Where, start_agent
from agentlightning.tracing.guard import guarded
from agentlightning.tracing.process import end_well, end_with_error

SCOPE: Final = "agentlightning.crewai"

Describe = Callable[[Any, tuple[Any, ...], dict[str, Any]], Sequence[str]]
"""The steps from the run around to this one, the last of which is its name; none where it is not a run."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Who is at work in the running code."""

    owner: object
    path: str
    span: SpanHandle
    open: dict[str, Callable[[BaseException], None]] = field(
        default_factory=dict[str, Callable[[BaseException], None]]
    )
    """How to end what is open under it, by span id."""

    def failed(self, error: BaseException) -> None:
        for fail in list(self.open.values()):
            fail(error)
        end_with_error(self.span, error)


class Watcher(Protocol):
    """Who wants to know of each outermost run."""

    def run_started(self, rollout_id: str) -> None: ...


_run: Final[ContextVar[_Run | None]] = ContextVar("agentlightning_crewai_run", default=None)
_watchers: Final[WeakSet[Any]] = WeakSet()


def watch(watcher: Watcher) -> None:
    """Tell this object of every outermost run that starts, as long as it lives."""
    _watchers.add(watcher)


def outermost_started(span: SpanRef) -> None:
    for watcher in list(_watchers):
        watcher.run_started(span.rollout_id)


def where(agent_name: str | None = None) -> Where:
    """Where the running code is: its place, and the agent at work there unless one is named."""
    run = _run.get()
    if agent_name is None:
        around = parent()
        agent_name = around.agent_name if around is not None else None
    return Where(SCOPE, agent_name, run.path if run is not None else None)


def parent() -> SpanRef | None:
    """The parent of a span that starts here: in a thread left over from a run, that run's span."""
    around, run = open_span(), _run.get()
    return run.span.ref if around is None and run is not None else around


@contextmanager
def opened(span: SpanHandle, fail: Callable[[BaseException], None]) -> Generator[None]:
    """The span is open inside; `fail` ends it should the run around end first."""
    run = _run.get()
    if run is not None:
        run.open[span.ref.span_id] = fail
    try:
        with use_open_span(span.ref):
            yield
    finally:
        if run is not None:
            run.open.pop(span.ref.span_id, None)


def is_outermost() -> bool:
    return _run.get() is None


# --- the names -----------------------------------------------------------------------------------


def agent_name(agent: Any) -> str | None:
    """An agent's role; roles from YAML files end with a newline."""
    role = getattr(agent, "role", None)
    return role.strip() if isinstance(role, str) else None


def crew_run(crew: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str]:  # noqa: ARG001
    if crew.stream:  # returns at once; the crew runs while it is read, and comes back here
        return ()
    return (str(crew.name or "crew"),)


def flow_run(flow: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str]:  # noqa: ARG001
    # CrewAI's own machinery, the loop of an agent above all, is made of flows too.
    if flow.stream or type(flow).__module__.startswith("crewai."):
        return ()
    return (str(flow.name or type(flow).__name__),)


def task_run(agent: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str]:
    """An agent at work on a task; tasks are named only where their author named them."""
    task = kwargs.get("task") or args[0]
    name = agent_name(agent) or "agent"
    return (str(task.name).strip(), name) if task.name else (name,)


def agent_run(agent: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str]:  # noqa: ARG001
    return (agent_name(agent) or "agent",)


def agent_run_outside_loop(agent: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str]:
    """In an event loop `Agent.kickoff` only returns the coroutine of `kickoff_async`."""
    return () if is_inside_event_loop() else agent_run(agent, args, kwargs)


# --- the spans -----------------------------------------------------------------------------------


def wrap_run(describe: Describe) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a method, sync or async, as a run of its object."""
    describe_safely = guarded(describe)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _running(self, describe_safely(self, args, kwargs)):
                return original(self, *args, **kwargs)

        @functools.wraps(original)
        async def arun(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _running(self, describe_safely(self, args, kwargs)):
                return await original(self, *args, **kwargs)

        return arun if inspect.iscoroutinefunction(original) else run

    return make


@contextmanager
def _running(owner: object, steps: Sequence[str] | None) -> Generator[None]:
    """Everything inside is a run of `owner`, unless there are no steps or it is at work already."""
    outer = _run.get()
    if not steps or (outer is not None and outer.owner is owner):
        yield
        return
    path = "/".join(steps if outer is None else (outer.path, *steps))
    span = _begin(steps[-1], path, outermost=outer is None)
    if span is None:
        yield
        return
    run = _Run(owner, path, span)
    with opened(span, run.failed):
        _run.set(run)
        try:
            yield
        except BaseException as error:
            _fail(run, error)
            raise
        finally:
            _run.set(outer)
    end_well(span)


@guarded
def _begin(name: str, path: str, *, outermost: bool) -> SpanHandle | None:
    tracer = get_tracer()
    if not tracer.enabled:
        return None
    span = start_agent(tracer, Where(SCOPE, name, path), parent(), name=name)
    if outermost:
        outermost_started(span.ref)
    return span


@guarded
def _fail(run: _Run, error: BaseException) -> None:
    run.failed(error)
