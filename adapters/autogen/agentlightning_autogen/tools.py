"""Tool calls: those that a model asked for, with how they ended, and tools that code runs by itself.

AutoGen turns every failure of a tool into a text for the model. Which kind of failure it was is seen by
wrapping the tool's own run inside the execution of the call.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from pydantic import ValidationError

from agentlightning.context import open_span, stream_under, use_open_span
from agentlightning.tracing import SpanHandle, get_tracer
from agentlightning.tracing.genai import Where, end_tool, start_tool
from agentlightning.tracing.guard import guarded
from agentlightning.types import ToolStatus
from agentlightning_autogen.agents import SCOPE


class _Execution:
    """One tool call under way, for the tool that runs inside to say why it failed."""

    __slots__ = ("bad_arguments", "call_id", "error", "span")

    def __init__(self, call_id: str | None, span: SpanHandle) -> None:
        self.call_id = call_id
        self.span = span
        self.error: BaseException | None = None
        self.bad_arguments = False

    def failed(self, tool: Any, error: BaseException) -> None:
        self.error = error
        self.bad_arguments = _refused_arguments(tool, error)


_executing: ContextVar[_Execution | None] = ContextVar("agentlightning_autogen_tool", default=None)


def _refused_arguments(tool: Any, error: BaseException) -> bool:
    """Whether the tool's schema refused them; any other ValidationError comes from inside the tool."""
    return isinstance(error, ValidationError) and error.title == tool.args_type().__name__


# --- the agent executes a call of the model ------------------------------------------------------


def wrap_execute_tool_call(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def execute_tool_call(*args: Any, **kwargs: Any) -> Any:
        execution = _begin(kwargs.get("tool_call") or (args[0] if args else None), kwargs.get("agent_name"))
        if execution is None:
            return await original(*args, **kwargs)
        token = _executing.set(execution)
        try:
            with use_open_span(execution.span.ref):
                answer = await original(*args, **kwargs)
        except BaseException as error:
            _end_raised(execution.span, error)
            raise
        finally:
            _executing.reset(token)
        await _end(execution, answer, kwargs)
        return answer

    return execute_tool_call


@guarded
def _begin(call: Any, agent_name: str | None) -> _Execution | None:
    tracer = get_tracer()
    if not tracer.enabled or call is None:
        return None
    around = open_span()
    where = Where(SCOPE, agent_name or (around.agent_name if around is not None else None))
    span = start_tool(tracer, where, around, name=call.name, arguments=call.arguments, call_id=call.id)
    return _Execution(call.id, span)


def _parsed(arguments: str) -> object:
    try:
        return json.loads(arguments)
    except (ValueError, TypeError):
        return arguments


async def _end(execution: _Execution, answer: Any, kwargs: dict[str, Any]) -> None:
    try:
        call, result = answer
        status = await _status(execution, call, result, kwargs)
        _end_answered(execution, status, result)
    except Exception:
        _end_raised(execution.span, None)


@guarded
def _end_answered(execution: _Execution, status: ToolStatus, result: Any) -> None:
    error = None if status is ToolStatus.OK else execution.error or str(result.content)
    end_tool(execution.span, status, result=result.content, error=error)


@guarded
def _end_raised(span: SpanHandle, error: BaseException | None) -> None:
    end_tool(span, ToolStatus.RAISED, error=error)


async def _status(execution: _Execution, call: Any, result: Any, kwargs: dict[str, Any]) -> ToolStatus:
    if not result.is_error:
        return ToolStatus.OK
    if execution.error is not None:
        return ToolStatus.BAD_ARGUMENTS if execution.bad_arguments else ToolStatus.RAISED
    if isinstance(_parsed(call.arguments), str):
        return ToolStatus.BAD_ARGUMENTS
    for workbench in kwargs.get("workbench") or ():
        if any(tool["name"] == call.name for tool in await workbench.list_tools()):
            return ToolStatus.RAISED
    return ToolStatus.UNKNOWN_TOOL


# --- the tool itself -----------------------------------------------------------------------------


def wrap_run_json(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def run_json(
        self: Any, args: Any, cancellation_token: Any, call_id: str | None = None, **kwargs: Any
    ) -> Any:
        execution = _executing.get()
        if execution is not None and execution.call_id == call_id:
            try:
                return await original(self, args, cancellation_token, call_id=call_id, **kwargs)
            except Exception as error:
                execution.failed(self, error)
                raise
        span = _begin_direct(self, args, call_id)
        if span is None:
            return await original(self, args, cancellation_token, call_id=call_id, **kwargs)
        try:
            with use_open_span(span.ref):
                result = await original(self, args, cancellation_token, call_id=call_id, **kwargs)
        except BaseException as error:
            _end_direct(self, span, error=error)
            raise
        _end_direct(self, span, result=result)
        return result

    return run_json


def wrap_run_json_stream(original: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncGenerator[Any]]:
    @functools.wraps(original)
    async def run_json_stream(
        self: Any, args: Any, cancellation_token: Any, call_id: str | None = None, **kwargs: Any
    ) -> AsyncGenerator[Any]:
        stream = original(self, args, cancellation_token, call_id=call_id, **kwargs)
        execution = _executing.get()
        inside = execution is not None and execution.call_id == call_id
        span = None if inside else _begin_direct(self, args, call_id)
        item: Any = None
        try:
            async for item in stream if span is None else stream_under(span.ref, stream):
                yield item
        except BaseException as error:
            if inside and execution is not None:
                execution.failed(self, error)
            elif span is not None:
                _end_direct(self, span, error=error)
            raise
        if span is not None:
            _end_direct(self, span, result=item)

    return run_json_stream


@guarded
def _begin_direct(tool: Any, args: Any, call_id: str | None) -> SpanHandle | None:
    """The span of a tool that code runs by itself, without an agent that executes a model's call."""
    tracer = get_tracer()
    if not tracer.enabled:
        return None
    around = open_span()
    where = Where(SCOPE, around.agent_name if around is not None else None)
    arguments = dict(args) if hasattr(args, "keys") else args
    return start_tool(
        tracer,
        where,
        around,
        name=tool.name,
        arguments=arguments,
        call_id=call_id,
        description=tool.description,
    )


@guarded
def _end_direct(tool: Any, span: SpanHandle, result: Any = None, error: BaseException | None = None) -> None:
    if error is None:
        end_tool(span, ToolStatus.OK, result=tool.return_value_as_string(result))
        return
    status = ToolStatus.BAD_ARGUMENTS if _refused_arguments(tool, error) else ToolStatus.RAISED
    end_tool(span, status, error=error)


def wrap_function_tool_run(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """AutoGen runs a plain function in a thread that loses context variables: hand them over."""

    @functools.wraps(original)
    async def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await original(_in_this_context(self) or self, *args, **kwargs)

    return run


@guarded
def _in_this_context(tool: Any) -> Any:
    function: Callable[..., Any] = tool._func
    if inspect.iscoroutinefunction(function):
        return tool
    here = contextvars.copy_context()
    twin = copy.copy(tool)
    twin._func = functools.wraps(function)(lambda *args, **kwargs: here.run(function, *args, **kwargs))
    return twin
