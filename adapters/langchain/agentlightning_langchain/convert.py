"""LangChain's messages and results as OpenAI chat messages, the way langchain-openai sends them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import LLMResult

from agentlightning.tracing.genai import LLMResponse
from agentlightning.types import Message

_dump: Final = json.JSONEncoder(ensure_ascii=False, default=str).encode
_ROLES: Final = {
    "human": "user",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "function",
    "HumanMessageChunk": "user",
    "AIMessageChunk": "assistant",
    "SystemMessageChunk": "system",
    "ToolMessageChunk": "tool",
}


def chat_messages(messages: Sequence[BaseMessage | str]) -> list[Message]:
    """The prompt of a chat model, or the text of a completion model as one user message."""
    return [
        {"role": "user", "content": message} if isinstance(message, str) else chat_message(message)
        for message in messages
    ]


def chat_message(message: BaseMessage) -> Message:
    """One message. `ToolMessage.status` and response metadata are not on the wire, so not here."""
    role = _ROLES.get(message.type) or str(getattr(message, "role", message.type))
    content: Any = cast("Any", message).content
    converted: dict[str, Any] = {"role": role, "content": content}
    if isinstance(message, ToolMessage):
        converted["tool_call_id"] = message.tool_call_id
        return converted
    extra = cast("dict[str, Any]", cast("Any", message).additional_kwargs)
    if role == "system":
        converted["role"] = extra.get("__openai_role__", "system")
    name = message.name or extra.get("name")
    if name is not None:
        converted["name"] = name
    if isinstance(message, AIMessage):
        _add_calls(converted, message, extra)
    return converted


def _add_calls(converted: dict[str, Any], message: AIMessage, extra: Mapping[str, Any]) -> None:
    calls = [_call(c["id"], c["name"], _arguments(c["args"])) for c in message.tool_calls]
    calls += [_call(c["id"], c["name"], c["args"]) for c in message.invalid_tool_calls]
    calls = calls or extra.get("tool_calls") or []
    if calls:
        converted["tool_calls"] = calls
        converted["content"] = converted["content"] or None
    for key in ("reasoning_content", "refusal", "function_call", "audio"):
        if extra.get(key) is not None:
            converted[key] = extra[key]


def _call(id: str | None, name: str | None, arguments: str | None) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(arguments: Mapping[str, Any]) -> str:
    return _dump(arguments)


def llm_response(result: LLMResult) -> LLMResponse:
    """The answer: all choices, usage, and the response id where LangChain keeps it (not in streams)."""
    generations: list[Any] = list(result.generations[0]) if result.generations else []
    if not generations:
        return LLMResponse({"role": "assistant", "content": None})
    choices = [_choice(generation) for generation in generations]
    message: Any = getattr(generations[0], "message", None)
    metadata: Mapping[str, Any] = getattr(message, "response_metadata", None) or {}
    info: Mapping[str, Any] = generations[0].generation_info or {}
    output: Mapping[str, Any] = result.llm_output or {}
    usage: Mapping[str, Any] = getattr(message, "usage_metadata", None) or {}
    counted: Mapping[str, Any] = output.get("token_usage") or {}
    return LLMResponse(
        message=choices[0],
        more=choices[1:],
        finish_reason=info.get("finish_reason") or metadata.get("finish_reason"),
        id=output.get("id") or metadata.get("id"),
        model=output.get("model_name") or metadata.get("model_name") or info.get("model_name"),
        input_tokens=usage.get("input_tokens", counted.get("prompt_tokens")),
        output_tokens=usage.get("output_tokens", counted.get("completion_tokens")),
    )


def _choice(generation: Any) -> Message:
    message = getattr(generation, "message", None)
    if isinstance(message, BaseMessage):
        return chat_message(message)
    return {"role": "assistant", "content": generation.text}
