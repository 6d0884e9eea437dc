"""The Responses API, put in the words of chat completions.

Our server does not serve it; a frozen agent of a flow may use it elsewhere. What chat has no word for (hosted
tools and their items) is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentlightning.tracing.genai import LLMResponse
from agentlightning.tracing.values import to_json
from agentlightning.types import JsonObject, Message
from agentlightning_openai_agents.request import Request, items, merged

_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "summary_text"})


def request(arguments: Mapping[str, Any]) -> Request:
    """From the arguments of `responses.create`."""
    parameters = merged(arguments)
    parameters["max_tokens"] = arguments.get("max_output_tokens")
    model = arguments.get("model")
    return Request(
        model=model if isinstance(model, str) else None,
        messages=_messages(arguments.get("instructions"), arguments.get("input")),
        tools=[_tool(tool) for tool in items(arguments.get("tools"))],
        parameters=parameters,
        stream=arguments.get("stream") is True,
    )


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool's schema; those of hosted tools as they are."""
    if tool["type"] != "function":
        return tool
    return {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}


def _messages(instructions: Any, given: Any) -> list[Message]:
    messages: list[dict[str, Any]] = []
    if isinstance(instructions, str):
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    for item in items(given):
        _add_item(messages, item)
    return cast("list[Message]", messages)


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Add one item; the text, reasoning and calls of one answer are one message."""
    kind = item.get("type", "message")
    if kind == "function_call_output":
        output = item.get("output")
        content = output if isinstance(output, str) else to_json(output)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind == "message" and item.get("role") != "assistant":
        messages.append({"role": item.get("role", "user"), "content": _content(item.get("content"))})
    else:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        _add_output(messages[-1], item)


def _add_output(message: dict[str, Any], item: Mapping[str, Any]) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        message["content"] = (message["content"] or "") + _text(item.get("content"))
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        said = _text(item.get("summary")) or _text(item.get("content"))
        message["reasoning_content"] = message.get("reasoning_content", "") + said
    else:
        message.setdefault("other_items", []).append(item)


def _content(content: Any) -> Any:
    """A user's content: texts as text, else the parts as they are."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content
    parts = cast("Sequence[Mapping[str, Any]]", content)
    return _text(parts) if all(part.get("type") in _TEXT_PARTS for part in parts) else list(parts)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = cast("Sequence[Mapping[str, Any]]", content or ())
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in parts)


def answer(response: Any) -> LLMResponse:
    """From a `Response`."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for item in response.output:
        _add_output(message, item.model_dump(exclude_none=True, exclude_unset=True))
    usage: Any = response.usage
    return LLMResponse(
        message=cast("JsonObject", message),
        finish_reason=_finish_reason(response, message),
        id=response.id,
        model=response.model,
        input_tokens=None if usage is None else usage.input_tokens,
        output_tokens=None if usage is None else usage.output_tokens,
    )


def _finish_reason(response: Any, message: Mapping[str, Any]) -> str | None:
    details: Any = response.incomplete_details
    if details is not None:
        return "length" if details.reason == "max_output_tokens" else details.reason
    return "tool_calls" if "tool_calls" in message else "stop"


class ResponsesStream:
    """The answer of a stream of events, whose last one brings it whole."""

    def __init__(self) -> None:
        self.finished = False
        self._answer: Any = None

    def add(self, item: Any) -> None:
        if item.type in ("response.completed", "response.incomplete", "response.failed"):
            self._answer = item.response
            self.finished = True

    def response(self) -> LLMResponse:
        if self._answer is None:
            return LLMResponse({"role": "assistant", "content": None})
        return answer(self._answer)
