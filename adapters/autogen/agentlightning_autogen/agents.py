"""Agent runs: `run` and `run_stream` of agents and teams, and each turn of an agent in a team."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

from agentlightning.context import SpanRef, open_span, stream_under, use_open_span
from agentlightning.tracing import SpanHandle, get_tracer
from agentlightning.tracing.genai import Where, start_agent
from agentlightning.tracing.guard import guarded
from agentlightning.tracing.process import end_well, end_with_error

SCOPE: Final = "agentlightning.autogen"


@guarded
def _start(name: str, *, inner: bool = False) -> SpanHandle | None:
    """The span of a run, unless an `inner` entry point is reached within the agent's own run."""
    tracer = get_tracer()
    around = open_span()
    if not tracer.enabled or (inner and _runs(around, name)):
        return None
    return start_agent(tracer, Where(SCOPE), around, name=name)


def _runs(around: SpanRef | None, name: str) -> bool:
    return around is not None and around.is_agent_run and around.agent_name == name


@contextmanager
def agent_span(name: str) -> Generator[None]:
    """Everything inside is a run of this agent."""
    span = _start(name)
    if span is None:
        yield
        return
    try:
        with use_open_span(span.ref):
            yield
    except BaseException as error:
        end_with_error(span, error)
        raise
    end_well(span)


def wrap_run(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with agent_span(self.name):
            return await original(self, *args, **kwargs)

    return run


def wrap_run_stream(
    original: Callable[..., AsyncGenerator[Any]], *, inner: bool = False
) -> Callable[..., AsyncGenerator[Any]]:
    @functools.wraps(original)
    async def run_stream(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        stream = original(self, *args, **kwargs)
        span = _start(self.name, inner=inner)
        if span is None:
            async for item in stream:
                yield item
            return
        try:
            async for item in stream_under(span.ref, stream):
                yield item
        except GeneratorExit:
            end_well(span)  # the consumer had enough, which is not the agent's failure
            raise
        except BaseException as error:
            end_with_error(span, error)
            raise
        end_well(span)

    return run_stream


def wrap_on_messages_stream(
    original: Callable[..., AsyncGenerator[Any]],
) -> Callable[..., AsyncGenerator[Any]]:
    """What a run and a turn in a team end up in, and what code may call by itself."""
    return wrap_run_stream(original, inner=True)


def wrap_invoke_agent_span(
    original: Callable[..., AbstractContextManager[Any]],
) -> Callable[..., AbstractContextManager[Any]]:
    """AutoGen's own context manager around an agent's turn in a team."""

    @contextmanager
    @functools.wraps(original)
    def invoke_agent_span(agent_name: str, *args: Any, **kwargs: Any) -> Generator[Any]:
        with agent_span(agent_name), original(agent_name, *args, **kwargs) as native:
            yield native

    return invoke_agent_span
