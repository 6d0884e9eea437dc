"""Requests and answers as keys that are equal when two writers saw the same one.

Frameworks and instrumentations add, drop and rewrite on the way: null or absent content, text as one string
or in parts, arguments as text or parsed, `developer` for `system`, call ids, names. The key keeps what
survives all of them: roles, texts, and the names and arguments of tool calls, in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from agentlightning.types import Json, Message

_ROLES: Final = {"developer": "system", "function": "tool", "human": "user", "ai": "assistant"}


def request_key(messages: Sequence[Message]) -> str:
    """The key of a whole request."""
    return _dump([_comparable(message) for message in messages])


def message_key(message: Message) -> str:
    """The key of one message."""
    return _dump(_comparable(message))


def arguments_key(arguments: Json) -> str:
    """The key of a tool call's arguments."""
    return _dump(_parsed(arguments))


def _comparable(message: Message) -> Mapping[str, Json]:
    role = message.get("role")
    calls = message.get("tool_calls")
    comparable: dict[str, Json] = {
        "role": _ROLES.get(role, role) if isinstance(role, str) else role,
        "content": _content(message.get("content")),
        "calls": [_call(call) for call in calls] if isinstance(calls, (list, tuple)) else [],
    }
    return {key: value for key, value in comparable.items() if value}


def _content(content: Json) -> Json:
    """Text as one string, other parts as they are."""
    if isinstance(content, (list, tuple)):
        texts = [_text_of(part) for part in content]
        return "".join(text for text in texts if text) if None not in texts else list(content)
    return content if content is None or isinstance(content, str) else _dump(content)


def _text_of(part: Json) -> str | None:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else None


def _call(call: Json) -> Json:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    return [function.get("name"), _parsed(function.get("arguments"))]


def _parsed(arguments: Json) -> Json:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _dump(value: Json) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
