from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tests.support.spans import (
    adapter_call,
    agent_run,
    attempt,
    gateway_call,
    reward,
    rollout,
    span,
    tool,
    user,
)

from agentlightning import semconv
from agentlightning.errors import InvalidInput
from agentlightning.reading import join_calls, read_episode, read_trace
from agentlightning.types import Span, SpanEvent, SpanStatus, ToolStatus


def episode_of(spans: list[Span]):  # noqa: ANN201
    return read_episode(rollout(), attempt(), spans)


def test_adapter_and_gateway_spans_meet_by_parent() -> None:
    asked = adapter_call(100, agent="writer")
    sampled = gateway_call(900, [1, 2], [3], parent_id=asked.span_id)
    (call,) = join_calls(read_trace([sampled, asked])).calls
    assert call.agent_name == "writer"
    assert call.span_id == asked.span_id
    assert call.gateway_span_id == sampled.span_id
    assert call.response_ids is not None
    assert call.response_ids.tolist() == [3]


def test_adapter_and_gateway_spans_meet_by_response_id() -> None:
    asked = adapter_call(100, agent="writer", response_id="chatcmpl-1")
    sampled = gateway_call(90, [1], [2], extra={semconv.RESPONSE_ID: "chatcmpl-1"})
    (call,) = join_calls(read_trace([asked, sampled])).calls
    assert (call.agent_name, call.policy_version) == ("writer", 3)


def test_equal_requests_meet_in_order_of_time() -> None:
    question = [user("same")]
    asked = [adapter_call(100 + i, agent=f"a{i}", messages=question) for i in range(2)]
    sampled = [gateway_call(200 + i, [1], [10 + i], messages=question) for i in range(2)]
    calls = join_calls(read_trace([*sampled, *asked])).calls
    assert [(c.agent_name, c.response_ids.tolist()) for c in calls if c.response_ids is not None] == [
        ("a0", [10]),
        ("a1", [11]),
    ]


def test_a_gateway_call_of_another_request_stays_on_its_own() -> None:
    asked = adapter_call(100, messages=[user("one")])
    sampled = gateway_call(101, [1], [2], messages=[user("two")])
    assert len(join_calls(read_trace([asked, sampled])).calls) == 2


def test_an_answer_that_the_agent_never_saw_is_reported_and_not_trained_on() -> None:
    asked = adapter_call(100, response_id="second")
    lost = gateway_call(101, [1], [2], parent_id=asked.span_id, extra={semconv.RESPONSE_ID: "first"})
    seen = gateway_call(105, [1], [3], parent_id=asked.span_id, extra={semconv.RESPONSE_ID: "second"})
    episode = episode_of([asked, lost, seen])
    assert [t.response_ids.tolist() for t in episode.transitions] == [[3]]
    assert any("never reached the agent" in sentence for sentence in episode.untrainable)


def test_of_a_streamed_retry_the_newest_success_counts() -> None:
    asked = adapter_call(100)
    failed = gateway_call(
        101, [1], [2], parent_id=asked.span_id, status=SpanStatus.ERROR, extra={semconv.RESPONSE_ID: "a"}
    )
    good = gateway_call(105, [1], [3], parent_id=asked.span_id, extra={semconv.RESPONSE_ID: "b"})
    assert [t.response_ids.tolist() for t in episode_of([asked, failed, good]).transitions] == [[3]]


def test_several_choices_of_one_request_are_several_transitions() -> None:
    asked = adapter_call(100, response_id="x")
    choices = [
        gateway_call(
            101, [1], [i], parent_id=asked.span_id, extra={semconv.RESPONSE_ID: "x", semconv.CHOICE_INDEX: i}
        )
        for i in (5, 6)
    ]
    assert sorted(t.response_ids.tolist() for t in episode_of([asked, *choices]).transitions) == [[5], [6]]


def test_calls_come_in_the_gateways_order_whatever_the_order_of_arrival() -> None:
    spans = [gateway_call(100 + i, [1], [i]) for i in range(20)]
    random.Random(0).shuffle(spans)
    assert [t.response_ids.tolist() for t in episode_of(spans).transitions] == [[i] for i in range(20)]


def test_a_span_sent_twice_counts_once() -> None:
    call = gateway_call(1, [1], [2])
    assert len(episode_of([call, call]).transitions) == 1


def test_the_agent_name_comes_from_the_nearest_enclosing_agent() -> None:
    outer = agent_run(0, "team")
    inner = agent_run(1, "writer", parent_id=outer.span_id)
    step = span("anything", 2, {}, parent_id=inner.span_id)
    call = gateway_call(3, [1], [2], parent_id=step.span_id)
    assert episode_of([outer, inner, step, call]).transitions[0].agent_name == "writer"


def test_spans_that_form_a_circle_do_not_hang_the_reader() -> None:
    a = span("a", 0, {}, span_id="0" * 15 + "a", parent_id="0" * 15 + "b")
    b = span("b", 0, {}, span_id="0" * 15 + "b", parent_id="0" * 15 + "a")
    call = gateway_call(3, [1], [2], parent_id=a.span_id)
    assert episode_of([a, b, call]).transitions[0].agent_name is None


def test_calls_of_a_frozen_model_are_context_not_transitions() -> None:
    own = gateway_call(1, [1], [2])
    frozen = adapter_call(5, agent="checker")
    episode = episode_of([own, frozen])
    assert len(episode.calls) == 2
    assert len(episode.transitions) == 1


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({semconv.RESPONSE_LOGPROBS: b"\0" * 8}, "1 response tokens but 2 logprobs"),
        ({semconv.RESPONSE_IDS: b"", semconv.RESPONSE_LOGPROBS: b""}, "sampled no token"),
        ({semconv.RESPONSE_IDS: b"abc"}, "no token ids"),
        ({semconv.POLICY_VERSION: "three"}, "policy version is not recorded"),
    ],
)
def test_a_call_that_cannot_be_trained_on_is_named_with_its_reason(
    attributes: dict[str, object], reason: str
) -> None:
    episode = episode_of([gateway_call(1, [1], [2], extra=attributes)])
    assert not episode.transitions
    assert reason in episode.untrainable[0]


def test_the_last_reward_under_a_name_counts() -> None:
    assert episode_of([reward(1, 0.25), reward(2, 0.75)]).final_reward == 0.75


def test_a_single_dimension_is_the_final_reward_whatever_its_name() -> None:
    assert episode_of([reward(1, 0.5, name="correct")]).final_reward == 0.5


def test_several_dimensions_without_weights_are_refused() -> None:
    with pytest.raises(InvalidInput, match="reward_weights"):
        episode_of([reward(1, 0.5, name="correct"), reward(2, 1, name="format")])


def test_weights_combine_dimensions() -> None:
    spans = [reward(1, 0.5, name="correct"), reward(2, 1.0, name="format")]
    weights = {"correct": 1.0, "format": 0.1}
    episode = read_episode(rollout(), attempt(), spans, reward_weights=weights)
    assert episode.final_reward == pytest.approx(0.6)


def test_no_reward_is_none_and_not_zero() -> None:
    assert episode_of([gateway_call(1, [1], [2])]).final_reward is None


def test_a_targeted_reward_reaches_its_call_by_either_span_id() -> None:
    asked = adapter_call(1)
    sampled = gateway_call(2, [1], [2], parent_id=asked.span_id)
    for target in (asked.span_id, sampled.span_id):
        episode = episode_of([asked, sampled, reward(3, 0.5, target=target)])
        assert episode.transitions[0].reward == 0.5
        assert episode.final_reward is None


def test_a_reward_for_no_call_of_the_policy_is_reported() -> None:
    assert "targets span" in episode_of([reward(1, 1.0, target="f" * 16)]).untrainable[0]


def test_spans_of_another_attempt_are_left_out() -> None:
    other = gateway_call(1, [1], [2], attempt_id="r1-2")
    assert not episode_of([other]).transitions


def test_tool_calls_are_read_with_status_and_parsed_values() -> None:
    (call,) = read_trace([tool(1, status=ToolStatus.BAD_ARGUMENTS, arguments="{broken")]).tool_calls
    assert (call.status, call.arguments, call.error) == (ToolStatus.BAD_ARGUMENTS, "{broken", "it failed")
    (good,) = read_trace([tool(1)]).tool_calls
    assert good.arguments == {"expression": "1 + 1"}
    assert good.result == 2


def test_attributes_of_the_wrong_type_never_raise() -> None:
    strange = {
        semconv.OPERATION: semconv.OP_CHAT,
        semconv.INPUT_MESSAGES: 7,
        semconv.OUTPUT_MESSAGES: "not json",
        semconv.TOOL_DEFINITIONS: "{}",
        semconv.PROMPT_IDS: [1, 2],
        semconv.REQUEST_TEMPERATURE: "hot",
        semconv.RESPONSE_FINISH_REASONS: 3,
    }
    (call,) = join_calls(read_trace([span("chat", 1, strange)])).calls
    assert call.messages == []
    assert call.temperature == 1.0


def test_a_tool_call_that_waits_for_a_person_is_none_until_it_goes_on() -> None:
    waiting = tool(1, "ask")
    attributes = {name: v for name, v in waiting.attributes.items() if name != semconv.TOOL_STATUS}
    waiting = replace(waiting, attributes=attributes, events=[SpanEvent(semconv.INTERRUPTED, 2)])
    trace = read_trace([waiting, tool(5, "ask", result="because")])
    assert [call.result for call in trace.tool_calls] == ["because"]


def test_an_agent_that_came_to_itself_again_ran_twice() -> None:
    outer = agent_run(1, "b", scope="agentlightning.openai_agents", end_ns=50)
    inner = agent_run(5, "b", scope="agentlightning.openai_agents", parent_id=outer.span_id)
    assert [run.name for run in read_trace([outer, inner]).agent_runs] == ["b", "b"]
