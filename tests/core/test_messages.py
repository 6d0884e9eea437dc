# pyright: reportUnknownLambdaType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlightning.messages import from_parts, messages_from_json, messages_to_json, output_to_json, to_parts

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
content_parts = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, texts),
    st.builds(lambda text: {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}, texts),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, texts),
    st.builds(lambda data: {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, texts),
    texts,
)
contents: Any = st.none() | texts | st.lists(content_parts, max_size=3)
tool_calls = st.one_of(
    st.builds(
        lambda id, name, arguments: {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        },
        texts,
        texts,
        texts,
    ),
    st.builds(lambda id: {"id": id, "type": "custom", "custom": {"name": "x", "input": "y"}}, texts),
    st.builds(lambda n: {"index": 0, "id": "c", "type": "function", "function": {"name": n}}, texts),
)
extras = st.fixed_dictionaries(
    {},
    optional={
        "name": texts,
        "refusal": st.none() | texts,
        "annotations": st.lists(json_values, max_size=1),
        "audio": st.none(),
        "function_call": st.none() | st.just({"name": "f", "arguments": "{}"}),
        "reasoning": texts,
    },
)
spoken = st.builds(
    lambda base, optional, extra: {**base, **optional, **extra},
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user", "assistant"])}),
    st.fixed_dictionaries(
        {},
        optional={
            "content": contents,
            "tool_calls": st.none() | st.lists(tool_calls, max_size=2),
            "reasoning_content": st.none() | texts,
        },
    ),
    extras,
)
tool_results = st.builds(
    lambda base, extra: {**base, **extra},
    st.fixed_dictionaries(
        {"role": st.just("tool"), "tool_call_id": st.none() | texts}, optional={"content": contents}
    ),
    extras,
)


@given(st.lists(spoken | tool_results, max_size=4))
def test_chat_messages_survive_the_round_trip(messages: list[dict[str, Any]]) -> None:
    assert messages_from_json(messages_to_json(messages)) == messages


@given(st.lists(spoken | tool_results, max_size=4))
def test_the_short_way_of_writing_says_the_same_as_the_long_one(messages: list[dict[str, Any]]) -> None:
    assert json.loads(messages_to_json(messages)) == [to_parts(message) for message in messages]
    for message in messages:
        (written,) = json.loads(output_to_json(message, "stop"))
        assert written == {**to_parts(message), "finish_reason": "stop"}


@given(spoken)
def test_an_output_message_survives_with_its_finish_reason(message: dict[str, Any]) -> None:
    text = output_to_json(message, "stop")
    assert json.loads(text)[0]["finish_reason"] == "stop"
    assert messages_from_json(text) == [message]


def test_parts_are_those_of_the_conventions() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert to_parts(
        {"role": "assistant", "reasoning_content": "hm", "content": "so", "tool_calls": [call]}
    ) == {
        "role": "assistant",
        "parts": [
            {"type": "reasoning", "content": "hm"},
            {"type": "text", "content": "so"},
            {"type": "tool_call", "id": "c1", "name": "add", "arguments": '{"a": 1}'},
        ],
    }
    assert to_parts({"role": "tool", "tool_call_id": "c1", "content": "3"})["parts"] == [
        {"type": "tool_call_response", "id": "c1", "response": "3"}
    ]


def test_arguments_that_do_not_parse_stay_what_the_model_wrote() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1,'}}
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert messages_from_json(messages_to_json([message])) == [message]


@pytest.mark.parametrize(
    ("foreign", "expected"),
    [
        (
            {
                "role": "assistant",
                "parts": [{"type": "tool_call", "id": "c", "name": "f", "arguments": {"a": 1}}],
            },
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
                    ],
                }
            ],
        ),
        (
            {
                "role": "tool",
                "parts": [
                    {"type": "tool_call_response", "id": "c", "result": "1"},
                    {"type": "tool_call_response", "id": "d", "response": "2"},
                ],
            },
            [
                {"role": "tool", "tool_call_id": "c", "content": "1"},
                {"role": "tool", "tool_call_id": "d", "content": "2"},
            ],
        ),
        ({"role": "user", "content": "plain"}, [{"role": "user", "content": "plain"}]),
        (
            {"role": "user", "parts": [{"type": "text", "content": "a"}, {"type": "text", "content": "b"}]},
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        ),
    ],
)
def test_what_other_writers_make_of_the_conventions_is_read(foreign: Any, expected: Any) -> None:
    assert from_parts(foreign) == expected


def test_text_that_is_not_json_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        messages_from_json("not json")
