"""Tool calls that LangChain sends no event for, read from the messages that follow them.

A call of a tool that does not exist leaves only a ToolMessage with status "error" in the next prompt,
arguments that do not parse leave only `invalid_tool_calls`, and a tool that the user's own loop runs leaves
only its ToolMessage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, cast

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from agentlightning.types import ToolStatus

_MAX_SEEN: Final = 20_000


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A tool call with its outcome, as far as the messages tell."""

    call_id: str
    name: str
    arguments: object
    status: ToolStatus
    result: object = None
    error: str | None = None


class SeenCalls:
    """Remembers which tool calls were recorded, the latest 20,000 of them."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()

    def add(self, scope: str, call_id: str | None) -> bool:
        """True when it is new. `scope` is the attempt or trace within which ids do not repeat."""
        if not call_id or (scope, call_id) in self._seen:
            return False
        self._seen[scope, call_id] = None
        if len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)
        return True

    def asked_again(self, scope: str, call_id: str | None) -> None:
        """A model asks for a call with this id: some servers number the calls of each response anew."""
        self._seen.pop((scope, call_id or ""), None)


def answered_calls(messages: Sequence[object], offered: frozenset[str]) -> list[FoundCall]:
    """The tool calls whose results end these messages.

    `offered` are the names of the tools that the model could choose from; empty when not known.
    """
    results: list[ToolMessage] = []
    for message in reversed(messages):
        if isinstance(message, ToolMessage):
            results.append(message)
        elif isinstance(message, AIMessage):
            asked = {call["id"]: call for call in message.tool_calls}
            return [_found(result, asked.get(result.tool_call_id), offered) for result in reversed(results)]
        elif results:
            break
        else:
            return []
    return [_found(result, None, offered) for result in reversed(results)]


def _found(result: ToolMessage, call: Mapping[str, Any] | None, offered: frozenset[str]) -> FoundCall:
    name = str((call or {}).get("name") or result.name or "unknown")
    content: object = cast("Any", result).content
    failed = result.status == "error"
    status = ToolStatus.OK
    if failed:
        status = ToolStatus.UNKNOWN_TOOL if offered and name not in offered else ToolStatus.RAISED
    return FoundCall(
        call_id=result.tool_call_id,
        name=name,
        arguments=(call or {}).get("args"),
        status=status,
        result=content,
        error=str(content) if failed else None,
    )


def unparsed_calls(message: BaseMessage | None) -> list[FoundCall]:
    """The tool calls of a response whose arguments are not JSON, which no agent executes."""
    if not isinstance(message, AIMessage):
        return []
    return [
        FoundCall(
            call_id=call["id"] or "",
            name=call["name"] or "unknown",
            arguments=call["args"],
            status=ToolStatus.BAD_ARGUMENTS,
            error=call["error"] or "The arguments are not JSON.",
        )
        for call in message.invalid_tool_calls
    ]


def offered_tools(parameters: Mapping[str, Any]) -> list[Any]:
    """The tool schemas of a request."""
    return list(parameters.get("tools") or parameters.get("functions") or ())


def tool_names(tools: Sequence[Any]) -> frozenset[str]:
    """The names in OpenAI's tool schemas, nested or flat."""
    names: set[str] = set()
    for tool in tools:
        if isinstance(tool, Mapping):
            schema = cast("Mapping[str, Any]", tool)
            function: Any = schema.get("function") or schema
            names.add(str(function.get("name")))
    return frozenset(names)


def tool_outcome(output: object) -> tuple[ToolStatus, object, str | None]:
    """Status, result and error of what a tool returned."""
    message = output if isinstance(output, ToolMessage) else _message_in_command(output)
    if message is None:
        return ToolStatus.OK, output, None
    content: object = cast("Any", message).content
    if message.status == "error":
        return ToolStatus.RAISED, content, str(content)
    return ToolStatus.OK, content, None


def _message_in_command(output: object) -> ToolMessage | None:
    """The ToolMessage in a LangGraph Command, as tools that hand over return it."""
    update = getattr(output, "update", None)
    if not isinstance(update, Mapping):
        return None
    messages = cast("Mapping[str, Any]", update).get("messages")
    if not isinstance(messages, Sequence):
        return None
    return next((m for m in cast("Sequence[object]", messages) if isinstance(m, ToolMessage)), None)


def refused_arguments(error: BaseException) -> bool:
    """Whether a tool's schema refused the arguments, rather than the tool's own code failing."""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        function = traceback.tb_frame.f_code.co_name
        if function in ("_run", "_arun"):
            return False
        if function == "_parse_input":
            return True
        traceback = traceback.tb_next
    return False
