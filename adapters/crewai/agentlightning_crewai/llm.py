"""Model calls of CrewAI's OpenAI-compatible models: one span per request, with the request as it was sent.

One call of a model makes one request or several (a structured answer that did not parse is asked for again, a
refused parameter is left out), so the span is that of the SDK's request; the model says in whose name.

Invariant: what a request returns or raises is untouched; where recording fails, it goes on without.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from agentlightning.tracing import SpanHandle, Tracer, get_tracer
from agentlightning.tracing.genai import LLMResponse, end_llm, start_llm
from agentlightning.tracing.guard import guarded
from agentlightning.tracing.process import end_with_error
from agentlightning_crewai import runs
from agentlightning_crewai.wire import CHAT, RESPONSES, Wire


@dataclass(frozen=True, slots=True)
class _Asking:
    """A model that is asking, and for whom."""

    llm: Any
    agent_name: str | None
    tracer: Tracer

    def uses(self, client: object) -> bool:
        # By identity: a tool that runs meanwhile may ask others with a client of its own.
        return client is self.llm._client or client is self.llm._async_client


@dataclass(frozen=True, slots=True)
class _Call:
    """One request under way."""

    span: SpanHandle
    wire: Wire

    @guarded
    def answered(self, body: Mapping[str, Any]) -> None:
        response = self.wire.response(body)
        if response is None:  # a 200 that reports an error, as some servers send
            self.failed(ValueError(str(body.get("error") or "The server sent no answer.")))
        else:
            end_llm(self.span, response)

    @guarded
    def failed(self, error: BaseException) -> None:
        end_with_error(self.span, error)


_asking: Final[ContextVar[_Asking | None]] = ContextVar("agentlightning_crewai_asking", default=None)


# --- the model -----------------------------------------------------------------------------------


def wrap_ask(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where the model makes the requests of one call, sync or async."""

    @functools.wraps(original)
    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _asking.get()
        _asking.set(_asked(self, kwargs.get("from_agent")))
        try:
            return original(self, *args, **kwargs)
        finally:
            _asking.set(before)

    @functools.wraps(original)
    async def aask(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _asking.get()
        _asking.set(_asked(self, kwargs.get("from_agent")))
        try:
            return await original(self, *args, **kwargs)
        finally:
            _asking.set(before)

    return aask if inspect.iscoroutinefunction(original) else ask


@guarded
def _asked(llm: Any, agent: Any) -> _Asking | None:
    tracer = get_tracer()
    return _Asking(llm, runs.agent_name(agent), tracer) if tracer.enabled else None


# --- the request ---------------------------------------------------------------------------------


def wrap_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """The SDK's `request`, under every method of its clients; requests of others pass."""

    @functools.wraps(original)
    def request(self: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
        call = _begin(self, options)
        if call is None:
            return original(self, cast_to, options, **kwargs)
        try:
            with runs.opened(call.span, call.failed):
                result = original(self, cast_to, options, **kwargs)
        except BaseException as error:
            call.failed(error)
            raise
        _arrived(call, result)
        return result

    @functools.wraps(original)
    async def arequest(self: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
        call = _begin(self, options)
        if call is None:
            return await original(self, cast_to, options, **kwargs)
        try:
            with runs.opened(call.span, call.failed):
                result = await original(self, cast_to, options, **kwargs)
        except BaseException as error:
            call.failed(error)
            raise
        _arrived(call, result)
        return result

    return arequest if inspect.iscoroutinefunction(original) else request


def _begin(client: object, options: Any) -> _Call | None:
    asking = _asking.get()
    return None if asking is None else _start(asking, client, options)


@guarded
def _start(asking: _Asking, client: object, options: Any) -> _Call | None:
    wire = {"/chat/completions": CHAT, "/responses": RESPONSES}.get(options.url)
    if wire is None or not asking.uses(client):
        return None
    body: Mapping[str, Any] = options.json_data
    span = start_llm(
        asking.tracer,
        runs.where(asking.agent_name),
        runs.parent(),
        model=body.get("model"),
        messages=wire.messages(body),
        tools=body.get("tools") or (),
        parameters=body,
        stream=bool(body.get("stream")),
    )
    if runs.is_outermost():
        runs.outermost_started(span.ref)
    return _Call(span, wire)


@guarded
def _arrived(call: _Call, result: Any) -> None:
    """The answer, or the beginning of a streamed one."""
    if hasattr(result, "_iterator"):
        # The stream stays the SDK's object: CrewAI reads it where it was made.
        watch = _awatched if hasattr(result._iterator, "__anext__") else _watched
        result._iterator = watch(call, result._iterator)
    elif hasattr(result, "http_response"):  # the body as it came, whatever the SDK makes of it
        call.answered(result.http_response.json())
    else:
        call.answered(result.model_dump(mode="json", exclude_unset=True))


def _watched(call: _Call, chunks: Iterator[Any]) -> Iterator[Any]:
    parts = call.wire.parts()
    try:
        for chunk in chunks:
            parts.add(chunk)
            yield chunk
    except BaseException as error:
        call.failed(error)
        raise
    _complete(call, parts.response)


async def _awatched(call: _Call, chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    parts = call.wire.parts()
    try:
        async for chunk in chunks:
            parts.add(chunk)
            yield chunk
    except BaseException as error:
        call.failed(error)
        raise
    _complete(call, parts.response)


@guarded
def _complete(call: _Call, response: Callable[[], LLMResponse | None]) -> None:
    found = response()
    if found is None:
        call.failed(ValueError("The stream ended without an answer."))
    else:
        end_llm(call.span, found)
