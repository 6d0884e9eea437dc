"""Tool calls in the text of a model: how they are written into a prompt and read from a response.

One `ToolFormat` per family of models; `detect_format` picks it from the chat template. Text that was meant as
a tool call and cannot be read stays in the content, and is reported, so that AIR can see it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

from agentlightning.types import JsonObject, Message


@dataclass(frozen=True, slots=True)
class Parsed:
    """A response read: text, tool calls in OpenAI's shape, and the text of a call that could not be read."""

    content: str
    tool_calls: Sequence[JsonObject] = ()
    malformed: str | None = None


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """What stands around the name and the arguments of a call, as Lark terminals."""

    before: str
    middle: str
    after: str
    between: str
    """What stands between two calls."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family of models writes tool calls."""

    name: str
    parse: Callable[[str], Parsed]
    render: Callable[[str, Mapping[str, Any]], str]
    """(function name, arguments) -> text, for templates that know no tools."""
    grammar: CallGrammar
    """How a call may be written, for answers that must hold one."""


def detect_format(chat_template: str | None) -> ToolFormat:
    """The format a chat template writes; Hermes for templates that know no tools."""
    template = chat_template or ""
    if "<tool_call>" not in template and "ipython" in template:
        return LLAMA3_JSON
    return HERMES


def renders_tools(chat_template: str | None) -> bool:
    """Whether the template itself writes tools and tool calls into the prompt."""
    return bool(re.search(r"\btools\b", chat_template or ""))


def tool_instructions(tools: Sequence[JsonObject]) -> str:
    """The system text that presents tools to a model whose template knows none."""
    functions = [json.dumps(_function(tool), ensure_ascii=False) for tool in tools]
    return (
        "You can call these functions:\n"
        + "\n".join(functions)
        + '\nTo call one, answer: <tool_call>{"name": <name>, "arguments": <object>}</tool_call>'
    )


def _function(tool: JsonObject) -> Mapping[str, Any]:
    """What a model needs to know of a function: name, description, parameters without titles."""
    function = cast("Mapping[str, Any]", tool.get("function") or tool)
    parameters = cast("Mapping[str, Any]", function.get("parameters") or {})
    properties = cast("Mapping[str, Any]", parameters.get("properties") or {})
    shown = {name: _untitled(schema) for name, schema in properties.items()}
    return {
        "name": function.get("name"),
        "description": function.get("description", ""),
        "parameters": shown,
    }


def _untitled(schema: Any) -> Any:
    if not isinstance(schema, Mapping):  # true and false are schemas too
        return schema
    fields = cast("Mapping[str, Any]", schema)
    return {key: value for key, value in fields.items() if key != "title"}


def _call(name: str, arguments: Any) -> JsonObject:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": text},
    }


def _read_call(text: str, arguments_key: str) -> JsonObject | None:
    """A call from its JSON text; None when it is no object with a name and an object of arguments."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, Mapping):
        return None
    fields = cast("Mapping[str, Any]", value)
    name, arguments = fields.get("name"), fields.get(arguments_key)
    if isinstance(name, str) and name and isinstance(arguments, Mapping):
        return _call(name, arguments)
    return None


_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def _parse_hermes(text: str) -> Parsed:
    if "<tool_call>" not in text:
        return Parsed(text)
    calls: list[JsonObject] = []
    for match in _HERMES.finditer(text):
        call = _read_call(match.group(1).strip(), "arguments")
        if call is None:
            return Parsed(text, malformed=match.group(0))
        calls.append(call)
    return Parsed(_HERMES.sub("", text).strip(), calls)


def _render_hermes(name: str, arguments: Mapping[str, Any]) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>{call}</tool_call>"


def _parse_llama3(text: str) -> Parsed:
    body = text.strip().removeprefix("<|python_tag|>").strip()
    if not body.startswith("{"):
        return Parsed(text)
    calls: list[JsonObject] = []
    for piece in re.split(r"\}\s*;\s*(?=\{)", body):
        closed = piece if piece.rstrip().endswith("}") and _read_call(piece, "parameters") else piece + "}"
        call = _read_call(closed, "parameters")
        if call is None:
            looks_like_call = '"name"' in body and '"parameters"' in body
            return Parsed(text, malformed=body if looks_like_call else None)
        calls.append(call)
    return Parsed("", calls)


def _render_llama3(name: str, arguments: Mapping[str, Any]) -> str:
    return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


HERMES = ToolFormat(
    "hermes",
    _parse_hermes,
    _render_hermes,
    CallGrammar(
        before=r'/<tool_call>\n?/ "{\"name\": "',
        middle=r'", \"arguments\": "',
        after=r'"}" /\n?<\/tool_call>/',
        between=r"/\n?/",
    ),
)
"""<tool_call>{"name": ..., "arguments": {...}}</tool_call> (Hermes, Qwen, and models trained here)."""
LLAMA3_JSON = ToolFormat(
    "llama3_json",
    _parse_llama3,
    _render_llama3,
    CallGrammar(before=r'"{\"name\": "', middle=r'", \"parameters\": "', after='"}"', between='"; "'),
)
"""{"name": ..., "parameters": {...}}, several separated by semicolons (Llama 3.1 and later)."""


def arguments_of(call: Mapping[str, Any]) -> Any:
    """The arguments of an OpenAI tool call as an object where they parse, else as they are."""
    function = cast("Mapping[str, Any]", call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            return json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return arguments
    return arguments


def assistant_message(parsed: Parsed) -> Message:
    """The assistant message of a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content or None}
    if parsed.tool_calls:
        message["tool_calls"] = list(parsed.tool_calls)
    elif message["content"] is None:
        message["content"] = ""
    return message
