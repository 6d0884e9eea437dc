"""What the model asked for, given to tool calls whose writer left it out.

Several instrumentations know neither a tool call's id nor, where they did not validate, its arguments; the
model's answer has both. A tool call without an id takes the first request for that tool, in the newest answer
before it, that no other tool call has taken; one with the same arguments first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from agentlightning.reading.comparable import arguments_key
from agentlightning.reading.dialects.base import items, parse
from agentlightning.types import Json, LLMCall, ToolCall


@dataclass(frozen=True, slots=True)
class _Request:
    call_id: str
    name: str
    arguments: Json
    asked_ns: int


def with_requests(tools: Sequence[ToolCall], calls: Sequence[LLMCall]) -> list[ToolCall]:
    """The tool calls in their order, with the ids that the model gave them."""
    taken = {tool.call_id for tool in tools if tool.call_id is not None}
    if all(tool.call_id is not None for tool in tools):
        return list(tools)
    requests = [request for call in calls for request in _requests(call)]
    return [tool if tool.call_id is not None else _with_request(tool, requests, taken) for tool in tools]


def _with_request(tool: ToolCall, requests: Sequence[_Request], taken: set[str]) -> ToolCall:
    free = [
        request
        for request in requests
        if request.name == tool.name and request.call_id not in taken and request.asked_ns <= tool.start_ns
    ]
    if not free:
        return tool
    newest = max(request.asked_ns for request in free)
    candidates = [request for request in free if request.asked_ns == newest]
    wanted = arguments_key(tool.arguments)
    request = next((r for r in candidates if arguments_key(r.arguments) == wanted), candidates[0])
    taken.add(request.call_id)
    arguments = tool.arguments if isinstance(tool.arguments, Mapping) else request.arguments
    return replace(tool, call_id=request.call_id, arguments=arguments)


def _requests(call: LLMCall) -> Iterator[_Request]:
    for item in items((call.output or {}).get("tool_calls")):
        function = item.get("function") if isinstance(item, Mapping) else None
        if not isinstance(item, Mapping) or not isinstance(function, Mapping):
            continue
        call_id, name = item.get("id"), function.get("name")
        if isinstance(call_id, str) and isinstance(name, str):
            yield _Request(call_id, name, parse(function.get("arguments")), call.start_ns)
