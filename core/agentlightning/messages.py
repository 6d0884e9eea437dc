"""OpenAI chat messages to and from the GenAI conventions' messages: a role and a list of typed parts.

    {"role": "assistant", "content": "Hm.", "tool_calls": [...]}
    {"role": "assistant", "parts": [{"type": "text", "content": "Hm."}, {"type": "tool_call", ...}]}

What this is not: a chat template, or a reader of other dialects' attributes.
Invariant: `from_parts(to_parts(message)) == [message]` for every chat-completions message. What the
conventions have no place for travels in keys of our own ("content_form", "extra", "raw"), and the arguments
of a tool call stay the text that the model wrote, which need not parse.
"""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from agentlightning.types import Json, JsonObject, Message

_string: Final = json.encoder.encode_basestring
_dump: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode
_PLACED: Final = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})


def messages_to_json(messages: Iterable[Message]) -> str:
    """The value of `gen_ai.input.messages`."""
    return f"[{','.join([_plain_json(message) or _dump(to_parts(message)) for message in messages])}]"


def output_to_json(message: Message, finish_reason: str | None = None, more: Sequence[Message] = ()) -> str:
    """The value of `gen_ai.output.messages`: the first choice, and `more` where several were asked for."""
    plain = _plain_json(message)
    if plain is not None and not more:
        end = "" if finish_reason is None else f',"finish_reason":{_string(finish_reason)}'
        return f"[{plain[:-1]}{end}}}]"
    output = to_parts(message)
    if finish_reason is not None:
        output["finish_reason"] = finish_reason
    return _dump([output, *(to_parts(other) for other in more)])


def messages_from_json(text: str) -> list[dict[str, Json]]:
    """Chat messages from the value of `gen_ai.input.messages` or `gen_ai.output.messages`.

    Takes what other writers make of the conventions as well. Raises ValueError for text that is not JSON.
    """
    parsed = json.loads(text)
    items = cast("Sequence[object]", parsed) if isinstance(parsed, list) else (cast("object", parsed),)
    return [
        message
        for item in items
        if isinstance(item, Mapping)
        for message in from_parts(cast("JsonObject", item))
    ]


# --- writing -------------------------------------------------------------------------------------


def _plain_json(message: Any) -> str | None:
    """What `_dump(to_parts(message))` gives, in a third of the time, for the shapes that nearly all messages
    have: texts, calls of functions, results of tools. None for any other."""
    if type(message) is not dict:
        return None
    role, content = message.get("role"), message.get("content")
    if type(role) is not str or "content" not in message:
        return None
    end, size = "", len(message)
    if "name" in message:
        name = message["name"]
        if type(name) is not str:
            return None
        end, size = f',"name":{_string(name)}', size - 1
    parts: str | None = None
    if type(content) is str and size == 2:
        parts = f'{{"type":"text","content":{_string(content)}}}'
    elif size == 3 and "tool_call_id" in message:
        call_id = message["tool_call_id"]
        if type(content) is str and type(call_id) is str:
            parts = f'{{"type":"tool_call_response","id":{_string(call_id)},"response":{_string(content)}}}'
    elif size == 3 and "tool_calls" in message and (content is None or type(content) is str):
        parts = _plain_calls(content, message["tool_calls"])
    return None if parts is None else f'{{"role":{_string(role)},"parts":[{parts}]{end}}}'


def _plain_calls(content: str | None, calls: Any) -> str | None:
    if type(calls) is not list or not calls:
        return None
    parts = [] if content is None else [f'{{"type":"text","content":{_string(content)}}}']
    for call in calls:
        function = call.get("function") if type(call) is dict and len(call) == 3 else None
        if type(function) is not dict or len(function) != 2 or call.get("type") != "function":
            return None
        id, name, arguments = call.get("id"), function.get("name"), function.get("arguments")
        if type(id) is not str or type(name) is not str or type(arguments) is not str:
            return None
        parts.append(
            f'{{"type":"tool_call","id":{_string(id)},"name":{_string(name)},"arguments":{_string(arguments)}}}'
        )
    return ",".join(parts)


def to_parts(message: Message) -> dict[str, Json]:
    """One chat message as role and parts."""
    role = message.get("role")
    content = message.get("content")
    parts: list[JsonObject] = []
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        parts.append({"type": "reasoning", "content": reasoning})
    result: dict[str, Json] = {"role": role, "parts": parts}
    if "tool_call_id" in message:
        parts.append({"type": "tool_call_response", "id": message["tool_call_id"], "response": content})
        form = None if "content" in message else "absent"
    else:
        form = _add_content(parts, message)
    tool_calls = message.get("tool_calls")
    if _is_list(tool_calls) and tool_calls:
        parts.extend(_tool_call_part(call) for call in cast("Sequence[Json]", tool_calls))
    if form is not None:
        result["content_form"] = form
    if "name" in message:
        result["name"] = message["name"]
    extra = _extra(message)
    if extra:
        result["extra"] = extra
    return result


def _add_content(parts: list[JsonObject], message: Message) -> str | None:
    """Add the parts of the content; how it was written, unless text is text and null is none."""
    if "content" not in message:
        return "absent"
    content = message["content"]
    if content is None:
        return None
    if isinstance(content, str):
        parts.append({"type": "text", "content": content})
        return None
    if not _is_list(content):
        parts.append({"type": "other", "raw": content})
        return "raw"
    parts.extend(_content_part(item) for item in cast("Sequence[Json]", content))
    return "parts"


def _content_part(item: Json) -> JsonObject:
    """A text part as the conventions have it, anything else (images, audio) as it is."""
    if isinstance(item, Mapping) and set(item) == {"type", "text"} and item["type"] == "text":
        return {"type": "text", "content": item["text"]}
    kind = item.get("type") if isinstance(item, Mapping) else None
    return {"type": kind if isinstance(kind, str) else "other", "raw": item}


def _tool_call_part(call: Json) -> JsonObject:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return {"type": "tool_call", "raw": call}
    part: dict[str, Json] = {
        "type": "tool_call",
        "id": call.get("id"),
        "name": function.get("name"),
        "arguments": function.get("arguments"),
    }
    if _function_call(part) != call:
        part["raw"] = call
    return part


def _extra(message: Message) -> dict[str, Json]:
    extra = {key: value for key, value in message.items() if key not in _PLACED}
    if "reasoning_content" in message and not isinstance(message["reasoning_content"], str):
        extra["reasoning_content"] = message["reasoning_content"]
    calls = message.get("tool_calls")
    if "tool_calls" in message and not (_is_list(calls) and calls):
        extra["tool_calls"] = calls
    return extra


def _is_list(value: Json) -> bool:
    return isinstance(value, (list, tuple))


# --- reading -------------------------------------------------------------------------------------


def from_parts(item: JsonObject) -> list[dict[str, Json]]:
    """Chat messages from role and parts.

    One message, except for foreign writers' tool messages that hold several results.
    """
    if "parts" not in item:  # a chat message already, as some writers leave them
        return [dict(item)]
    parts = [part for part in _sequence(item["parts"]) if isinstance(part, Mapping)]
    results = [part for part in parts if part.get("type") == "tool_call_response"]
    if results:
        return [_tool_message(item, part) for part in results]
    message: dict[str, Json] = {"role": item.get("role")}
    _restore_content(message, parts, item.get("content_form"))
    reasoning = [part for part in parts if part.get("type") in ("reasoning", "thinking")]
    if reasoning:
        message["reasoning_content"] = "".join(str(part.get("content") or "") for part in reasoning)
    calls = [_tool_call(part) for part in parts if part.get("type") == "tool_call"]
    if calls:
        message["tool_calls"] = calls
    _restore_rest(message, item)
    return [message]


def _tool_message(item: JsonObject, part: JsonObject) -> dict[str, Json]:
    message: dict[str, Json] = {"role": item.get("role", "tool"), "tool_call_id": part.get("id")}
    if item.get("content_form") != "absent":
        message["content"] = part["response"] if "response" in part else part.get("result")
    _restore_rest(message, item)
    return message


def _restore_content(message: dict[str, Json], parts: Sequence[JsonObject], form: Json) -> None:
    if form == "absent":
        return
    shown = [part for part in parts if part.get("type") not in ("reasoning", "thinking", "tool_call")]
    if form == "raw":
        message["content"] = shown[0].get("raw") if shown else None
    elif form == "parts" or len(shown) > 1 or any(part.get("type") != "text" for part in shown):
        message["content"] = [_content_item(part) for part in shown]
    else:
        message["content"] = shown[0].get("content") if shown else None


def _content_item(part: JsonObject) -> Json:
    if "raw" in part:
        return part["raw"]
    if part.get("type") == "text":
        return {"type": "text", "text": part.get("content")}
    return part


def _tool_call(part: JsonObject) -> Json:
    return part["raw"] if "raw" in part else _function_call(part)


def _function_call(part: JsonObject) -> dict[str, Json]:
    arguments = part.get("arguments")
    text = arguments if isinstance(arguments, str) or arguments is None else _dump(arguments)
    return {
        "id": part.get("id"),
        "type": "function",
        "function": {"name": part.get("name"), "arguments": text},
    }


def _restore_rest(message: dict[str, Json], item: JsonObject) -> None:
    if "name" in item:
        message["name"] = item["name"]
    extra = item.get("extra")
    if isinstance(extra, Mapping):
        message.update(extra)


def _sequence(value: Json) -> Sequence[Json]:
    return cast("Sequence[Json]", value) if _is_list(value) else ()
