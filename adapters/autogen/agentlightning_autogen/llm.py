"""Model calls of AutoGen's OpenAI-compatible clients: one span per request, with the request as it was sent.

Invariant: what a client returns or raises is untouched; where recording fails, the call goes on without.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final, cast

from autogen_core.models import CreateResult

from agentlightning.context import SpanRef, open_span, set_open_span
from agentlightning.tracing import SpanHandle, Tracer, get_tracer
from agentlightning.tracing.genai import LLMResponse, Where, end_llm, start_llm
from agentlightning.tracing.guard import guarded
from agentlightning.tracing.process import end_with_error
from agentlightning.types import Json, JsonObject
from agentlightning_autogen.agents import SCOPE

_FINISH_REASONS: Final = {"function_calls": "tool_calls", "unknown": None}


class _Call:
    """One `create` or `create_stream` under way."""

    __slots__ = ("parent", "response", "span", "stream", "tracer")

    def __init__(self, tracer: Tracer, stream: bool) -> None:
        self.tracer = tracer
        self.stream = stream
        self.parent: SpanRef | None = open_span()
        self.span: SpanHandle | None = None
        self.response: Mapping[str, Any] | None = None

    @guarded
    def started(self, params: Any) -> None:
        """The request is ready: its messages, tools and arguments are those of the wire."""
        if self.span is not None:
            return
        arguments: dict[str, Any] = params.create_args
        agent_name = self.parent.agent_name if self.parent is not None else None
        self.span = start_llm(
            self.tracer,
            Where(SCOPE, agent_name),
            self.parent,
            model=arguments.get("model"),
            messages=params.messages,
            tools=params.tools,
            parameters=arguments,
            stream=self.stream,
        )
        set_open_span(self.span.ref)

    @guarded
    def answered(self, result: Any) -> None:
        if self.span is None:
            return
        if self.response is not None:
            end_llm(self.span, _raw_response(self.response))
        elif isinstance(result, CreateResult):
            end_llm(self.span, _created(result))
        else:
            self.span.end()

    @guarded
    def failed(self, error: BaseException) -> None:
        if self.span is not None:
            end_with_error(self.span, error)


_running: ContextVar[_Call | None] = ContextVar("agentlightning_autogen_call", default=None)


def wrap_create(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = get_tracer()
        if not tracer.enabled:
            return await original(self, *args, **kwargs)
        call = _Call(tracer, stream=False)
        token = _running.set(call)
        try:
            result = await original(self, *args, **kwargs)
        except BaseException as error:
            call.failed(error)
            raise
        finally:
            _running.reset(token)
            set_open_span(call.parent)
        call.answered(result)
        return result

    return create


def wrap_create_stream(original: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncGenerator[Any]]:
    @functools.wraps(original)
    async def create_stream(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        stream = original(self, *args, **kwargs)
        tracer = get_tracer()
        if not tracer.enabled:
            async for item in stream:
                yield item
            return
        call = _Call(tracer, stream=True)
        item: Any = None
        try:
            async for item in _stepped(call, stream):
                if isinstance(item, CreateResult):
                    call.answered(item)
                yield item
        except BaseException as error:
            call.failed(error)
            raise
        call.answered(item)

    return create_stream


async def _stepped(call: _Call, stream: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """The stream, with the call's span open only while the client works and not in its consumer."""
    try:
        while True:
            token = _running.set(call)
            before = open_span()
            if call.span is not None:
                set_open_span(call.span.ref)
            try:
                item = await anext(stream)
            except StopAsyncIteration:
                return
            finally:
                _running.reset(token)
                set_open_span(before)
            yield item
    finally:
        await stream.aclose()


def wrap_process_create_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where the client turns its arguments into those of the request."""

    @functools.wraps(original)
    def process_create_args(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        call = _running.get()
        if call is not None:
            call.started(params)
        return params

    return process_create_args


def wrap_call_event(original: Callable[..., Any]) -> Callable[..., Any]:
    """The event that the client makes of each response, whether anybody listens to it or not."""

    @functools.wraps(original)
    def call_event(*args: Any, **kwargs: Any) -> Any:
        call = _running.get()
        if call is not None:
            call.response = kwargs.get("response")
        return original(*args, **kwargs)

    return call_event


def _raw_response(response: Mapping[str, Any]) -> LLMResponse:
    choice: Mapping[str, Any] = response["choices"][0]
    usage: Mapping[str, Any] = response.get("usage") or {}
    return LLMResponse(
        message=_bare(choice["message"]),
        finish_reason=choice.get("finish_reason"),
        id=response.get("id"),
        model=response.get("model"),
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
    )


def _bare(message: Mapping[str, Any]) -> JsonObject:
    """The message without what the SDK adds: nulls for absent fields, and parsed copies of its texts."""
    kept = {key: value for key, value in message.items() if value is not None and key != "parsed"}
    kept["content"] = message.get("content")
    if "tool_calls" in kept:
        kept["tool_calls"] = [_bare_call(call) for call in kept["tool_calls"]]
    return cast("JsonObject", kept)


def _bare_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function: Mapping[str, Any] = call.get("function") or {}
    bare = {key: value for key, value in call.items() if value is not None}
    if function:
        bare["function"] = {key: function.get(key) for key in ("name", "arguments")}
    return bare


def _created(result: CreateResult) -> LLMResponse:
    """What a stream leaves of a response: no id, and usage only where the client asks for it."""
    message: dict[str, Json] = {"role": "assistant"}
    if isinstance(result.content, str):
        message["content"] = result.content
        if result.thought:
            message["reasoning_content"] = result.thought
    else:
        message["content"] = result.thought  # the client keeps text beside tool calls there
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in result.content
        ]
    return LLMResponse(
        message=message,
        finish_reason=_FINISH_REASONS.get(result.finish_reason, result.finish_reason),
        input_tokens=result.usage.prompt_tokens or None,
        output_tokens=result.usage.completion_tokens or None,
    )
