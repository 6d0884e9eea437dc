"""What an answer is held to, as a grammar for the engine: a JSON schema, a call of certain tools, or either.

Grammars are Lark as llguidance reads it, with JSON schemas inside. JSON is written the way `json.dumps` does
it, on one line: a small model left free to indent fills its answer with spaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentlightning.types import JsonObject
from agentlightning_server.gateway.requests import ChatRequest
from agentlightning_server.gateway.toolcalls import ToolFormat

_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,  # read as anyOf, which is what pydantic's discriminated unions mean
}


def grammar_of(request: ChatRequest, form: ToolFormat) -> str | None:
    """The grammar of a request's answer; None where it is free.

    Where a schema and tools are given, the model may call tools or answer by the schema, as with OpenAI.
    """
    if request.must_call:
        tools = [tool for tool in request.tools if _function(tool)["name"] in request.must_call]
        return "start: calls\n" + _calls(tools, form, several=request.parallel_tool_calls)
    if request.schema is None:
        return None
    answer = f"answer: {_json(request.schema)}\n"
    if not request.tools:
        return "start: answer\n" + answer
    return "start: answer | calls\n" + answer + _calls(request.tools, form, request.parallel_tool_calls)


def _calls(tools: Sequence[JsonObject], form: ToolFormat, several: bool) -> str:
    """Rules for one or several calls of these tools, each with arguments of its own schema."""
    around = form.grammar
    more = f" ({around.between} call)*" if several else ""
    rules = [f"calls: call{more}", "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        function = _function(tool)
        name = _literal(json.dumps(function["name"], ensure_ascii=False))
        rules.append(f"call_{i}: {around.before} {name} {around.middle} arguments_{i} {around.after}")
        rules.append(f"arguments_{i}: {_json(function.get('parameters') or {'type': 'object'})}")
    return "\n".join(rules) + "\n"


def _function(tool: JsonObject) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", tool["function"])


def _literal(text: str) -> str:
    """A Lark string, which is escaped as JSON's are."""
    return json.dumps(text, ensure_ascii=False)


def _json(schema: JsonObject) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _STYLE}, ensure_ascii=False)
