"""Model calls through the SDK's OpenAI models: one span per request, with the request as it was sent.

The SDK's own span of a call has no tool schemas, no finish reason and, for chat completions, no response id,
and there is none where tracing is disabled. So the models' `_fetch_response` is wrapped, and the two places
where it has the request complete.

Invariant: what a model returns or raises is untouched; where recording fails, the call goes on without.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final, Protocol

from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel

from agentlightning.context import SpanRef, open_span, set_open_span
from agentlightning.tracing import SpanHandle, Tracer, get_tracer
from agentlightning.tracing.genai import LLMResponse, end_llm, start_llm
from agentlightning.tracing.guard import guarded
from agentlightning.tracing.process import end_with_error
from agentlightning_openai_agents import chat, responses
from agentlightning_openai_agents.request import Request
from agentlightning_openai_agents.runs import is_recording, where


class Collected(Protocol):
    """The answer that a stream adds up to."""

    finished: bool
    """Whether the model has said its last word, though the stream may go on."""

    def add(self, item: Any) -> None: ...
    def response(self) -> LLMResponse: ...


class _Call:
    """One request under way."""

    __slots__ = ("collected", "is_chat", "parent", "span", "tracer")

    def __init__(self, tracer: Tracer, is_chat: bool) -> None:
        self.tracer = tracer
        self.is_chat = is_chat
        self.parent: SpanRef | None = open_span()
        self.span: SpanHandle | None = None
        self.collected: Collected = chat.ChatStream() if is_chat else responses.ResponsesStream()

    @guarded
    def requested(self, read: Callable[[Mapping[str, Any]], Request], arguments: Mapping[str, Any]) -> None:
        """The request is complete and about to be sent."""
        if self.span is not None:
            return
        request = read(arguments)
        self.span = start_llm(
            self.tracer,
            where(),
            self.parent,
            model=request.model,
            messages=request.messages,
            tools=request.tools,
            parameters=request.parameters,
            stream=request.stream,
        )
        set_open_span(self.span.ref)

    @guarded
    def answered(self, answer: Any) -> None:
        if self.span is not None:
            end_llm(self.span, chat.completion(answer) if self.is_chat else responses.answer(answer))

    @guarded
    def passed(self, item: Any) -> None:
        self.collected.add(item)

    @guarded
    def ended(self) -> None:
        if self.span is not None:
            end_llm(self.span, self.collected.response())

    def left(self) -> None:
        """The reader of the stream has had enough, which after the model's last word is no loss."""
        if self.collected.finished:
            self.ended()
        else:
            self.failed(GeneratorExit())

    @guarded
    def failed(self, error: BaseException) -> None:
        if self.span is not None:
            end_with_error(self.span, error)


_running: Final[ContextVar[_Call | None]] = ContextVar("agentlightning_openai_agents_call", default=None)


@guarded
def _begin(model: Any) -> _Call | None:
    tracer = get_tracer()
    if not tracer.enabled or not is_recording():
        return None
    return _Call(tracer, isinstance(model, OpenAIChatCompletionsModel))


def wrap_fetch_response(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Where a model asks its API, and gets the answer or the stream of one."""

    @functools.wraps(original)
    async def fetch_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _begin(self)
        if call is None:
            return await original(self, *args, **kwargs)
        _running.set(call)
        try:
            answer = await original(self, *args, **kwargs)
        except BaseException as error:
            call.failed(error)
            raise
        finally:
            _running.set(None)
            set_open_span(call.parent)
        if not kwargs.get("stream"):
            call.answered(answer)
            return answer
        if not call.is_chat:
            return _WatchedStream(answer, call)
        response, stream = answer
        return response, _WatchedStream(stream, call)

    return fetch_response


def wrap_create(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`AsyncCompletions.create` of the OpenAI SDK: only calls of the models above are looked at."""

    @functools.wraps(original)
    async def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _running.get()
        if call is not None:
            call.requested(chat.request, kwargs)
        return await original(self, *args, **kwargs)

    return create


def wrap_build_create_kwargs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where the Responses model has put its request together."""

    @functools.wraps(original)
    def build_create_kwargs(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = original(self, *args, **kwargs)
        call = _running.get()
        if call is not None:
            call.requested(responses.request, arguments)
        return arguments

    return build_create_kwargs


class _WatchedStream:
    """The SDK's stream of one answer, telling the call what passes; everything else is the stream's own."""

    def __init__(self, stream: Any, call: _Call) -> None:
        self._stream = stream
        self._call = call
        self._items: AsyncIterator[Any] = stream if hasattr(stream, "__anext__") else aiter(stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            item = await anext(self._items)
        except StopAsyncIteration:
            self._call.ended()
            raise
        except BaseException as error:
            self._call.failed(error)
            raise
        self._call.passed(item)
        return item

    async def aclose(self) -> None:
        self._call.left()
        close = getattr(self._stream, "aclose", None) or getattr(self._stream, "close", None)
        closing = close() if close is not None else None
        if inspect.isawaitable(closing):
            await closing
