from __future__ import annotations

from typing import Any

import pytest

from agentlightning.errors import InvalidInput
from agentlightning_server.gateway.recording import Caller
from agentlightning_server.gateway.requests import parse_chat_request
from agentlightning_server.gateway.toolcalls import arguments_of, tool_instructions

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "policy", "messages": HELLO, **fields}


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, r"messages\[0\].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": True}]}, r"messages\[0\].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": None}]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "must be a string"),
        ({"tools": {}, "n": 0}, "'n'"),
        ({"tools": "f"}, "'tools' must be"),
        ({"tools": [5]}, r"tools\[0\] must be"),
        ({"tools": [{"type": "function", "function": "f"}]}, r"tools\[0\] must be"),
        ({"tools": [tool(), tool(name=5)]}, r"tools\[1\] must be"),
        ({"tools": [tool(parameters=[1])]}, r"tools\[0\].function.parameters must be"),
        ({"tools": [tool(parameters={"properties": [1]})]}, "properties must be an object"),
        ({"tool_choice": "required"}, "'tool_choice'"),
        ({"tools": [tool()], "tool_choice": tool(name="g")}, "'tool_choice'"),
        ({"tools": [tool()], "tool_choice": "f"}, "'tool_choice'"),
        ({"response_format": "json"}, "'response_format'"),
        ({"response_format": {"type": "json_schema"}}, "'response_format'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": True}}}, "'response_format'"),
        ({"response_format": {"type": "grammar"}}, "'response_format'"),
    ],
)
def test_odd_shapes_are_refused_with_the_place_named(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        parse_chat_request(body(**fields))


def test_a_limit_of_null_is_no_limit_and_does_not_hide_the_other_name() -> None:
    asked = parse_chat_request(body(max_completion_tokens=None, max_tokens=3))
    assert asked.max_tokens == 3
    assert parse_chat_request(body(max_completion_tokens=4, max_tokens=3)).max_tokens == 4


def test_a_temperature_that_would_overflow_the_logits_is_greedy() -> None:
    assert parse_chat_request(body(temperature=1e-300)).temperature == 0.0
    assert parse_chat_request(body(temperature=0.01)).temperature == 0.01


def test_tools_without_parameters_or_with_unusual_schemas_are_written_out() -> None:
    schema = {"a": True, "b": {"title": "B", "$ref": "#/$defs/B"}}
    asked = parse_chat_request(
        body(tools=[tool(), tool(parameters=None), tool(parameters={"properties": schema})])
    )
    assert '"parameters": {"a": true, "b": {"$ref": "#/$defs/B"}}' in tool_instructions(asked.tools)


def test_arguments_too_deep_to_read_stay_text() -> None:
    deep = "[" * 100_000
    assert arguments_of({"function": {"name": "f", "arguments": deep}}) == deep


def test_a_traceparent_of_zeros_is_none() -> None:
    caller = Caller.of(f"00-{'0' * 32}-{'d' * 16}-01", None, None)
    assert caller.trace_id != "0" * 32
    assert caller.parent_id is None
    assert Caller.of(f"00-{'c' * 32}-{'0' * 16}-01", None, None).parent_id is None
