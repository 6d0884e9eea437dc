"""Real traces of foreign instrumentations, recorded by tests/foreign/record.py, read into episodes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.foreign import EXPECTED, SAMPLES, assert_read, episode_of, sample
from tests.support.spans import (
    adapter_call,
    new_id,
    span,
    user,
)

from agentlightning import semconv
from agentlightning.reading import read_trace
from agentlightning.types import Span, SpanEvent, SpanStatus


def test_every_application_has_a_sample_and_an_expectation() -> None:
    assert {path.stem for path in SAMPLES.glob("*.json")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recorded_trace_is_read_in_full(name: str) -> None:
    spans = sample(name)
    assert_read(episode_of(spans), EXPECTED[name])
    assert bool(read_trace(spans).merged) == EXPECTED[name].merged


@pytest.mark.parametrize("name", EXPECTED)
def test_samples_stay_small(name: str) -> None:
    assert (SAMPLES / f"{name}.json").stat().st_size < 60_000


# --- what no installed package writes ------------------------------------------------------------


def test_messages_as_events_of_the_span() -> None:
    """GenAI up to 1.36, as SDKs with span events write it: nested values as JSON text."""
    request = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    events = (
        SpanEvent("gen_ai.system.message", 1, {"content": "Be brief."}),
        SpanEvent("gen_ai.user.message", 2, {"content": "1?"}),
        SpanEvent("gen_ai.assistant.message", 3, {"tool_calls": json.dumps([request])}),
        SpanEvent("gen_ai.tool.message", 4, {"content": "1", "id": "c1"}),
        SpanEvent(
            "gen_ai.choice", 5, {"index": 0, "finish_reason": "stop", "message": '{"content": "One."}'}
        ),
    )
    attributes = {
        semconv.OPERATION: "chat",
        "gen_ai.system": "openai",
        "gen_ai.usage.prompt_tokens": 7,
        "gen_ai.usage.completion_tokens": 4,
    }
    (call,) = episode_of([span("chat m", 1, attributes, events=events)]).calls
    assert call.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "tool_calls": [request]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
    ]
    assert call.output == {"role": "assistant", "content": "One."}
    assert (call.finish_reason, call.input_tokens, call.output_tokens) == ("stop", 7, 4)


def test_messages_as_the_body_of_events() -> None:
    events = (
        SpanEvent("gen_ai.user.message", 1, {"gen_ai.event.content": '{"content": "1?"}'}),
        SpanEvent("gen_ai.choice", 2, {"gen_ai.event.content": '{"message": {"content": "One."}}'}),
    )
    (call,) = episode_of([span("chat", 1, {semconv.OPERATION: "chat"}, events=events)]).calls
    assert (call.messages, call.output) == ([user("1?")], {"role": "assistant", "content": "One."})


def test_messages_as_one_blob_per_side() -> None:
    events = (
        SpanEvent("gen_ai.content.prompt", 1, {"gen_ai.prompt": '[{"role": "user", "content": "1?"}]'}),
        SpanEvent(
            "gen_ai.content.completion",
            2,
            {"gen_ai.completion": '[{"role": "assistant", "content": "One."}]'},
        ),
    )
    (call,) = episode_of([span("chat", 1, {semconv.OPERATION: "chat"}, events=events)]).calls
    assert (call.messages, call.output) == ([user("1?")], {"role": "assistant", "content": "One."})


def test_content_in_the_operation_details_event_and_as_structured_values() -> None:
    details = {
        semconv.INPUT_MESSAGES: [{"role": "user", "parts": [{"type": "text", "content": "1?"}]}],
        semconv.OUTPUT_MESSAGES: [
            {"role": "assistant", "parts": [{"type": "text", "content": "One."}], "finish_reason": "stop"}
        ],
        "gen_ai.system_instructions": [{"type": "text", "content": "Be brief."}],
    }
    event = SpanEvent("gen_ai.client.inference.operation.details", 2, details)
    (call,) = episode_of([span("chat", 1, {semconv.OPERATION: "chat"}, events=(event,))]).calls
    assert call.messages == [{"role": "system", "content": "Be brief."}, user("1?")]
    assert (call.output, call.finish_reason) == ({"role": "assistant", "content": "One."}, "stop")


def test_a_tool_result_beside_a_new_question_is_two_messages() -> None:
    """pydantic-ai puts both into one message of the user."""
    mixed = {
        "role": "user",
        "parts": [
            {"type": "tool_call_response", "id": "c1", "name": "add", "result": {"sum": 3}},
            {"type": "text", "content": "And now?"},
        ],
    }
    attributes = {semconv.OPERATION: "chat", semconv.INPUT_MESSAGES: json.dumps([mixed])}
    (call,) = episode_of([span("chat", 1, attributes, scope="pydantic-ai")]).calls
    assert call.messages == [
        {"role": "tool", "tool_call_id": "c1", "content": '{"sum": 3}'},
        user("And now?"),
    ]


def test_openinference_content_in_parts() -> None:
    attributes = {
        "openinference.span.kind": "LLM",
        "llm.input_messages.0.message.role": "user",
        "llm.input_messages.0.message.contents.0.message_content.type": "text",
        "llm.input_messages.0.message.contents.0.message_content.text": "What is it?",
        "llm.input_messages.0.message.contents.1.message_content.type": "image",
        "llm.input_messages.0.message.contents.1.message_content.image.image.url": "data:x",
    }
    (call,) = episode_of([span("llm", 1, attributes)]).calls
    assert call.messages[0]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:x"}},
    ]


def test_pydantic_ai_of_before_it_named_operations() -> None:
    run = span("agent run", 1, {"agent_name": "calc", "model_name": "m"}, scope="pydantic-ai", end_ns=50)
    executed = span(
        "running tool",
        2,
        {semconv.TOOL_NAME: "add", "tool_arguments": '{"a": 1}', "tool_response": "1"},
        scope="pydantic-ai",
        parent_id=run.span_id,
    )
    episode = episode_of([run, executed])
    assert [found.name for found in episode.agent_runs] == ["calc"]
    (call,) = episode.tool_calls
    assert (call.name, call.arguments, call.result, call.agent_name) == ("add", {"a": 1}, 1, "calc")


def test_the_error_of_a_call_is_its_exceptions_where_the_status_has_no_message() -> None:
    event = SpanEvent("exception", 2, {"exception.message": "scripted 500"})
    failed = adapter_call(1, messages=[user("q")], status=SpanStatus.ERROR, events=(event,))
    assert [call.error for call in episode_of([failed]).calls] == ["scripted 500"]


# --- anything at all -----------------------------------------------------------------------------

NAMES = sorted(
    {name for file in SAMPLES.glob("*.json") for item in sample(file.stem) for name in item.attributes}
    | {"gen_ai.prompt", "events", "gen_ai.prompt.0", "llm.input_messages.0", "llm.tools.0.tool.json_schema"}
)
SCOPES = [
    "",
    "pydantic-ai",
    "agentlightning.langchain",
    semconv.SCOPE_GATEWAY,
    "opentelemetry.instrumentation.crewai",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from(
        ["LLM", "TOOL", "AGENT", "CHAIN", "chat", "execute_tool", "invoke_agent", "tool", "agent"]
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "parts", "type", "content", "tool_calls", "function", "name", "arguments", "id"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(NAMES),
    VALUES | VALUES.map(lambda value: json.dumps(value, default=str)),
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(ATTRIBUTES, st.sampled_from(SCOPES), st.booleans()), max_size=4), ATTRIBUTES)
def test_whatever_the_attributes_hold_reading_never_raises(
    made: list[tuple[dict[str, Any], str, bool]], event: dict[str, Any]
) -> None:
    parent = None
    spans: list[Span] = []
    for i, (attributes, scope, failed) in enumerate(made):
        status = SpanStatus.ERROR if failed else SpanStatus.UNSET
        events = tuple(
            SpanEvent(name, 1, event) for name in ("exception", "gen_ai.choice", "gen_ai.user.message")
        )
        spans.append(
            span(
                "s",
                i,
                attributes,
                scope=scope,
                status=status,
                events=events,
                parent_id=parent,
                span_id=new_id(),
            )
        )
        parent = spans[-1].span_id
    spans = [item for item in spans if semconv.REWARD_VALUE not in item.attributes]
    episode = episode_of(spans)
    assert len(episode.calls) <= len(spans)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000], ids=["list", "object", "number"]
)
@pytest.mark.parametrize(
    "name", [semconv.INPUT_MESSAGES, "events", "output.value", "traceloop.entity.input", "metadata"]
)
def test_hostile_json_reads_as_absent(name: str, text: str) -> None:
    for kind in (
        {semconv.OPERATION: "chat"},
        {"openinference.span.kind": "TOOL"},
        {"traceloop.span.kind": "tool"},
    ):
        read_trace([span("s", 1, {**kind, name: text})])
