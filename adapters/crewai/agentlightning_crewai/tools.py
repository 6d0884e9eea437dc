"""Tool calls of a model: what was asked, what came of it, and how it failed.

CrewAI turns every failure of a tool into a text for the model. Which kind of failure it was is noted where
CrewAI itself finds it: it makes a `ToolFailure` of each, of which the exception, the schema's refusal and an
unknown name are seen on the way.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

from crewai.tools.tool_failure import ToolFailureReason
from crewai.utilities.agent_utils import extract_tool_call_info

from agentlightning import semconv
from agentlightning.tracing import SpanHandle, get_tracer
from agentlightning.tracing.genai import end_tool, start_tool
from agentlightning.tracing.guard import guarded
from agentlightning.types import ToolStatus
from agentlightning_crewai import runs

RETRY_EVENT: Final = "retry"
"""CrewAI runs a failed tool of the text loop again before it tells the model: one call, with such events."""

_STATUS: Final = {
    ToolFailureReason.UNKNOWN_TOOL: ToolStatus.UNKNOWN_TOOL,
    ToolFailureReason.INVALID_INPUT: ToolStatus.BAD_ARGUMENTS,
}


class _Execution:
    """One tool call under way, for what runs inside to say how it fails."""

    __slots__ = ("delegates", "error", "failure", "refused", "span", "unknown")

    def __init__(self, span: SpanHandle) -> None:
        self.span = span
        self.failure: Any = None
        self.error: BaseException | None = None
        self.refused: BaseException | None = None
        """What the tool's schema raised."""
        self.unknown = False
        self.delegates = False

    def status(self) -> ToolStatus:
        if self.unknown:
            return ToolStatus.UNKNOWN_TOOL
        if self.refused is not None and self.refused is self.error:
            return ToolStatus.BAD_ARGUMENTS
        if self.failure is not None:
            return _STATUS.get(self.failure.reason, ToolStatus.RAISED)
        return ToolStatus.OK if self.error is None else ToolStatus.RAISED

    @guarded
    def answered(self, result: Any) -> None:
        status = self.status()
        message = self.failure.message if self.failure is not None else str(result)
        error = None if status is ToolStatus.OK else self.error or message
        end_tool(self.span, status, result=result, error=error)

    @guarded
    def raised(self, error: BaseException) -> None:
        """The call itself raised, as under a policy that lets failures end the run."""
        status = self.status()
        end_tool(
            self.span, ToolStatus.RAISED if status is ToolStatus.OK else status, error=self.error or error
        )


_executing: Final[ContextVar[_Execution | None]] = ContextVar("agentlightning_crewai_tool", default=None)

Asked = tuple[str, object, str | None]
"""Name, arguments and call id of what a model asked for."""


def _wrap_execution(
    original: Callable[..., Any],
    asked: Callable[[tuple[Any, ...], dict[str, Any]], Asked | None],
    result_of: Callable[[Any], Any],
) -> Callable[..., Any]:
    @functools.wraps(original)
    def execute(*args: Any, **kwargs: Any) -> Any:
        execution = _begin(asked, args, kwargs)
        if execution is None:
            return original(*args, **kwargs)
        before = _executing.get()
        _executing.set(execution)
        try:
            with runs.opened(execution.span, execution.raised):
                answer = original(*args, **kwargs)
        except BaseException as error:
            execution.raised(error)
            raise
        finally:
            _executing.set(before)
        execution.answered(result_of(answer))
        return answer

    return execute


@guarded
def _begin(asked: Callable[..., Asked | None], args: Any, kwargs: Any) -> _Execution | None:
    tracer = get_tracer()
    found = asked(args, kwargs) if tracer.enabled else None
    if found is None:
        return None
    name, arguments, call_id = found
    span = start_tool(
        tracer, runs.where(), runs.parent(), name=name, arguments=_parsed(arguments), call_id=call_id
    )
    return _Execution(span)


def _parsed(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


# --- a call that a model made --------------------------------------------------------------------


def wrap_native_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """The agent executor's method for one call of the model's function calling."""
    return _wrap_execution(original, lambda args, kwargs: _native(kwargs, *args[1:]), _of_native)


def wrap_native_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that does the same for one step of a plan."""
    return _wrap_execution(original, lambda args, kwargs: _native(kwargs, *args), _of_native)


def _native(kwargs: dict[str, Any], tool_call: Any = None) -> Asked | None:
    found = extract_tool_call_info(kwargs.get("tool_call", tool_call))
    if found is None:
        return None
    call_id, name, arguments = found
    return name, arguments, call_id


def _of_native(answer: Any) -> Any:
    return answer.get("result") if isinstance(answer, dict) else answer.result  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def wrap_text_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """One "Action:" of the text loop."""
    return _wrap_execution(original, lambda args, kwargs: _text(kwargs, *args), lambda answer: answer.result)


def _text(kwargs: dict[str, Any], action: Any = None, *_: Any) -> Asked:
    action = kwargs.get("agent_action", action)
    return str(action.tool).strip(), action.tool_input, None


def wrap_llm_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that `LLM.call(available_functions=...)` runs by itself."""

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                _note("error", error)
                raise

        return run

    @functools.wraps(original)
    def handle(
        self: Any, function_name: str, function_args: Any, available_functions: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if function_name in available_functions:
            function = noted(available_functions[function_name])
            available_functions = {**available_functions, function_name: function}
        else:
            _note("unknown", True)
        return original(self, function_name, function_args, available_functions, *args, **kwargs)

    return _wrap_execution(handle, lambda args, kwargs: _function(kwargs, *args[1:]), lambda answer: answer)


def _function(kwargs: dict[str, Any], name: Any = None, arguments: Any = None, *_: Any) -> Asked:
    return kwargs.get("function_name", name), kwargs.get("function_args", arguments), None


# --- how it fails --------------------------------------------------------------------------------


@guarded
def _note(what: str, value: object) -> None:
    execution = _executing.get()
    if execution is not None:
        setattr(execution, what, value)


def wrap_handle_failure(original: Callable[..., Any]) -> Callable[..., Any]:
    """What CrewAI calls with each failure, whatever its policy."""

    @functools.wraps(original)
    def handle_tool_failure(failure: Any, *args: Any, **kwargs: Any) -> Any:
        if failure.reason is not ToolFailureReason.REPEATED_CALL:  # said of the agent, not of this call
            _note("failure", failure)
        return original(failure, *args, **kwargs)

    return handle_tool_failure


def wrap_failure_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """What CrewAI makes of an exception that it will not try again."""

    @functools.wraps(original)
    def failure_from_exception(error: BaseException, *args: Any, **kwargs: Any) -> Any:
        _note("error", error)
        return original(error, *args, **kwargs)

    return failure_from_exception


def wrap_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    """A tool's check of its arguments."""

    @functools.wraps(original)
    def validate(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except Exception as error:
            _note("refused", error)
            raise

    return validate


def wrap_select(original: Callable[..., Any]) -> Callable[..., Any]:
    """The text loop's search for the tool, which may be made again with another reading of the text."""

    @functools.wraps(original)
    def select(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            found = original(self, *args, **kwargs)
        except Exception:
            _note("unknown", True)
            raise
        _note("unknown", False)
        return found

    return select


def wrap_tool_error(original: Callable[..., Any]) -> Callable[..., Any]:
    """The text loop's report of one failed try."""

    @functools.wraps(original)
    def on_tool_error(self: Any, *args: Any, **kwargs: Any) -> Any:
        _tried(kwargs.get("e") or (args[2] if len(args) > 2 else None))
        return original(self, *args, **kwargs)

    return on_tool_error


@guarded
def _tried(error: BaseException | None) -> None:
    execution = _executing.get()
    if execution is not None:
        execution.span.event(RETRY_EVENT, {semconv.ERROR_TYPE: type(error).__qualname__, "error": str(error)})


# --- delegation, which turns a coworker's failure into its answer --------------------------------


def wrap_delegation(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def delegate(self: Any, agent_name: Any = None, *args: Any, **kwargs: Any) -> Any:
        _note("delegates", True)
        _check_coworker(self, agent_name)
        return original(self, agent_name, *args, **kwargs)

    return delegate


@guarded
def _check_coworker(tool: Any, name: Any) -> None:
    wanted = tool.sanitize_agent_name(name or "")
    if wanted not in [tool.sanitize_agent_name(agent.role) for agent in tool.agents]:
        error = ValueError(f"No coworker has the role {name!r}.")
        _note("error", error)
        _note("refused", error)


def wrap_delegated_run(original: Callable[..., Any]) -> Callable[..., Any]:
    """A coworker's run: CrewAI answers the model with the text of what it raises."""

    @functools.wraps(original)
    def execute_task(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except Exception as error:
            execution = _executing.get()
            if execution is not None and execution.delegates:
                execution.error = error
            raise

    return execute_task
