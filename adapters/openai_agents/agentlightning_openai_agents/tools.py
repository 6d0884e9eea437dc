"""Tool calls of a model: how each ended, also where the SDK only gives the model a text.

The SDK hands a tool's exception to a function that words it for the model, and has no span at all for a
tool that does not exist. So the execution of a call is wrapped, and the places in it that see the exception.
A handoff is a tool call too: the model asks for it by name.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any, Final

from agents.exceptions import ModelBehaviorError, UserError
from agents.items import ToolApprovalItem
from agents.tool import FunctionTool, FunctionToolResult
from openai.types.responses import ResponseFunctionToolCall

from agentlightning import semconv
from agentlightning.context import open_span, use_open_span
from agentlightning.tracing import SpanHandle, get_tracer
from agentlightning.tracing.genai import end_tool, start_tool
from agentlightning.tracing.guard import guarded
from agentlightning.types import ToolStatus
from agentlightning_openai_agents.runs import is_recording, where


class _Execution:
    """One tool call under way, for what runs inside to say why it failed."""

    __slots__ = ("error", "name", "span")

    def __init__(self, name: str, span: SpanHandle) -> None:
        self.name = name
        self.span = span
        self.error: BaseException | None = None

    @guarded
    def answered(self, result: Any) -> None:
        item = result.run_item if isinstance(result, FunctionToolResult) else None
        if isinstance(item, ToolApprovalItem):
            self.span.event(semconv.INTERRUPTED)
            self.span.end()
        elif item is not None:
            self._end(ToolStatus.RAISED, result.output, str(result.output))
        elif self.error is not None:
            self._end(self._failure(self.error), result, self.error)
        else:
            self._end(ToolStatus.OK, result, None)

    @guarded
    def raised(self, error: BaseException) -> None:
        cause = self.error
        if cause is None:  # a tool without a handler: the SDK wraps what it raised
            cause = (error.__cause__ if isinstance(error, UserError) else None) or error
        self._end(self._failure(cause), None, cause)

    def _failure(self, error: BaseException) -> ToolStatus:
        # The SDK has no type for it. In a tool that is an agent it may come from a tool of that agent.
        refused = isinstance(error, ModelBehaviorError) and str(error).startswith(
            (f"Invalid JSON input for tool {self.name}", "Invalid JSON when parsing", "Handoff function")
        )
        return ToolStatus.BAD_ARGUMENTS if refused else ToolStatus.RAISED

    def _end(self, status: ToolStatus, result: object, error: BaseException | str | None) -> None:
        end_tool(self.span, status, result=result, error=error)


_executing: Final[ContextVar[_Execution | None]] = ContextVar(
    "agentlightning_openai_agents_tool", default=None
)


@guarded
def _begin(call: Any, description: str | None = None) -> _Execution | None:
    """Start the span of a `ResponseFunctionToolCall`."""
    tracer = get_tracer()
    if not tracer.enabled or not is_recording():
        return None
    span = start_tool(
        tracer,
        where(),
        open_span(),
        name=call.name,
        arguments=call.arguments,
        call_id=call.call_id,
        description=description,
    )
    return _Execution(call.name, span)


# --- a tool that exists --------------------------------------------------------------------------


def wrap_run_single_tool(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def run_single_tool(self: Any, *, func_tool: FunctionTool, tool_call: Any, **kwargs: Any) -> Any:
        execution = _begin(tool_call, func_tool.description)
        if execution is None:
            return await original(self, func_tool=func_tool, tool_call=tool_call, **kwargs)
        before = _executing.get()
        _executing.set(execution)
        try:
            with use_open_span(execution.span.ref):
                result = await original(self, func_tool=func_tool, tool_call=tool_call, **kwargs)
        except BaseException as error:
            execution.raised(error)
            raise
        finally:
            _executing.set(before)
        execution.answered(result)
        return result

    return run_single_tool


def wrap_word_failure(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Where the SDK words a tool's exception for the model, or finds that it should not."""

    @functools.wraps(original)
    async def word_failure(*args: Any, **kwargs: Any) -> Any:
        _note(kwargs.get("error"))
        return await original(*args, **kwargs)

    return word_failure


def wrap_timeout_init(original: Callable[..., None]) -> Callable[..., None]:
    """The exception of a tool that took too long, which the SDK makes but need not raise."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _note(self)

    return init


def _note(error: BaseException | None) -> None:
    execution = _executing.get()
    if execution is not None and error is not None:
        execution.error = error


# --- a tool that does not exist ------------------------------------------------------------------


def wrap_process_model_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where a response with an unknown tool ends the run, as is the SDK's default."""

    @functools.wraps(original)
    def process_model_response(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except ModelBehaviorError as error:
            _record_unknown(error, kwargs)
            raise

    return process_model_response


@guarded
def _record_unknown(error: ModelBehaviorError, response: dict[str, Any]) -> None:
    known = {tool.name for tool in response["all_tools"]}
    known |= {handoff.tool_name for handoff in response["handoffs"]}
    for item in response["response"].output:
        name: str = getattr(item, "name", "")
        if isinstance(item, ResponseFunctionToolCall) and name not in known and _names(error, name):
            _end_unknown(item, None, error)


def _names(error: ModelBehaviorError, tool: str) -> bool:
    return f"{tool} not found in agent" in str(error)


def wrap_build_not_found_items(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Where the model is told of unknown tools, as `tool_not_found_behavior` may ask for."""

    @functools.wraps(original)
    async def build_not_found_items(*args: Any, **kwargs: Any) -> Any:
        told = await original(*args, **kwargs)
        _record_told(kwargs.get("calls") or (), told)
        return told

    return build_not_found_items


@guarded
def _record_told(calls: Sequence[Any], told: Sequence[Any]) -> None:
    for call, item in zip(calls, told, strict=False):
        _end_unknown(call.tool_call, item.output, str(item.output))


def _end_unknown(call: Any, result: object, error: BaseException | str) -> None:
    execution = _begin(call)
    if execution is not None:
        end_tool(execution.span, ToolStatus.UNKNOWN_TOOL, result=result, error=error)


# --- handoffs ------------------------------------------------------------------------------------


def wrap_execute_handoffs(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Where the first handoff that a response asks for is made, and others are refused."""

    @functools.wraps(original)
    async def execute_handoffs(*args: Any, **kwargs: Any) -> Any:
        asked: Sequence[Any] = kwargs.get("run_handoffs") or ()
        execution = _begin(asked[0].tool_call, asked[0].handoff.tool_description) if asked else None
        if execution is None:
            return await original(*args, **kwargs)
        try:
            with use_open_span(execution.span.ref):
                step = await original(*args, **kwargs)
        except BaseException as error:
            execution.raised(error)
            raise
        _end_handoffs(execution, asked, step)
        return step

    return execute_handoffs


@guarded
def _end_handoffs(execution: _Execution, asked: Sequence[Any], step: Any) -> None:
    execution.answered(asked[0].handoff.get_transfer_message(step.next_step.new_agent))
    for ignored in asked[1:]:
        refused = _begin(ignored.tool_call)
        if refused is not None:
            end_tool(refused.span, ToolStatus.RAISED, error="Only the first of several handoffs is made.")
