"""One record of each model call and tool call, however many instrumentations saw it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.support.foreign import EXPECTED, episode_of, sample
from tests.support.spans import adapter_call, agent_run, gateway_call, reward, span, tool, user

from agentlightning import semconv
from agentlightning.reading import join_calls, read_trace
from agentlightning.reading.comparable import request_key
from agentlightning.types import Span, ToolStatus

# --- what the model asked for --------------------------------------------------------------------


def asking(at: int, *calls: tuple[str, str, str]) -> Span:
    requests = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]
    output = {"role": "assistant", "content": None, "tool_calls": requests}
    return adapter_call(at, messages=[user(str(at))], output=output)


def ids(*spans: Span) -> list[str | None]:
    return [call.call_id for call in episode_of(list(spans)).tool_calls]


def test_tool_calls_without_ids_take_those_of_the_answer_before_them() -> None:
    first = asking(1, ("c1", "add", '{"a": 1}'), ("c2", "add", '{"a": 2}'), ("c3", "mul", "{}"))
    executed = [
        tool(20, "mul", arguments="{}"),
        tool(21, "add", arguments='{"a": 2}'),
        tool(22, "add", arguments='{"a": 1}'),
    ]
    again = asking(50, ("c4", "add", '{"a": 2}'))
    assert ids(first, *executed, again, tool(70, "add", arguments='{"a": 2}')) == ["c3", "c2", "c1", "c4"]


def test_a_tool_call_that_nobody_asked_for_has_no_id() -> None:
    asked = asking(10, ("c1", "add", "{}"))
    assert ids(tool(1, "add"), asked, tool(30, "mul"), tool(31, "add"), tool(32, "add")) == [
        None,
        None,
        "c1",
        None,
    ]


# --- duplicates ----------------------------------------------------------------------------------


def foreign(made: Span, scope: str = "other.instrumentation", **changes: Any) -> Span:
    return replace(made, scope=scope, **changes)


def ours(made: Span, **changes: Any) -> Span:
    return replace(made, scope="agentlightning.langchain", **changes)


def test_a_call_inside_a_call_with_the_same_request_is_one() -> None:
    outer = foreign(adapter_call(1, messages=[user("q")], agent="writer", end_ns=90))
    inner = foreign(
        adapter_call(2, messages=[user("q")], response_id="r", parent_id=outer.span_id), "other.client"
    )
    (call,) = episode_of([inner, outer]).calls
    assert (call.span_id, call.agent_name, call.response_id) == (outer.span_id, "writer", "r")


def test_a_call_inside_a_call_with_another_request_is_another() -> None:
    outer = foreign(adapter_call(1, messages=[user("q")], end_ns=90))
    judged: Any = {"role": "assistant", "content": "good"}
    inner = foreign(
        adapter_call(2, messages=[user("judge q")], output=judged, parent_id=outer.span_id), "other.client"
    )
    assert len(episode_of([inner, outer]).calls) == 2


@pytest.mark.parametrize("response_id", ["r", None])
def test_a_framework_that_traces_another_request_than_it_sends_makes_one_call(
    response_id: str | None,
) -> None:
    """pydantic-ai rewrites a tool's error on the way to the wire."""
    outer = foreign(adapter_call(1, messages=[user("a list")], response_id=response_id, end_ns=90))
    sent = adapter_call(2, messages=[user("as text")], response_id=response_id, parent_id=outer.span_id)
    (call,) = episode_of([outer, foreign(sent, "other.client")]).calls
    assert call.span_id == outer.span_id


@pytest.mark.parametrize("between", [agent_run(2, "helper"), tool(2)], ids=["agent", "tool"])
def test_a_call_below_an_agent_or_a_tool_is_another(between: Span) -> None:
    outer = foreign(adapter_call(1, messages=[user("q")], end_ns=90))
    step = replace(between, parent_id=outer.span_id, end_ns=80)
    inner = foreign(adapter_call(3, messages=[user("q")], parent_id=step.span_id))
    assert len(episode_of([outer, step, inner]).calls) == 2


def test_requests_sent_again_inside_one_call_are_one_call_with_the_last_answer() -> None:
    outer = foreign(adapter_call(1, messages=[user("q")], end_ns=90))
    tries = [
        foreign(
            adapter_call(10 * i, messages=[user("q")], response_id=f"r{i}", parent_id=outer.span_id), "client"
        )
        for i in (1, 2)
    ]
    (call,) = episode_of([outer, *tries]).calls
    assert call.response_id == "r2"


def test_beside_our_adapter_a_foreign_call_adds_nothing() -> None:
    other = foreign(adapter_call(1, messages=[user("q")], response_id="r", end_ns=90))
    own = ours(adapter_call(2, messages=[user("q")], agent="writer", end_ns=80))
    sampled = gateway_call(5, [1], [2], messages=[user("q")], parent_id=own.span_id)
    episode = episode_of([other, own, sampled])
    (call,) = episode.calls
    assert (call.span_id, call.agent_name) == (own.span_id, "writer")
    assert len(episode.transitions) == 1


def test_two_calls_of_one_instrumentation_are_two_however_alike() -> None:
    calls = [foreign(adapter_call(i, messages=[user("q")], end_ns=90)) for i in (1, 2)]
    assert len(episode_of(calls).calls) == 2


def test_concurrent_equal_calls_seen_twice_are_two() -> None:
    both = [
        foreign(adapter_call(i, messages=[user("q")], response_id=f"r{i % 2}", end_ns=90), scope)
        for i, scope in enumerate(["framework", "framework", "client", "client"])
    ]
    assert [call.response_id for call in episode_of(both).calls] == ["r0", "r1"]


def test_two_adapters_of_ours_never_see_the_same_call() -> None:
    both = [
        replace(adapter_call(i, messages=[user("q")], end_ns=90), scope=f"agentlightning.{name}")
        for i, name in enumerate(["langchain", "autogen"])
    ]
    assert len(episode_of(both).calls) == 2


def test_a_call_below_a_run_that_was_merged_away_has_its_agents_name() -> None:
    other = foreign(agent_run(1, "writer", end_ns=900))
    own = ours(agent_run(2, "writer", end_ns=900))
    call = foreign(adapter_call(3, messages=[user("q")], parent_id=other.span_id))
    episode = episode_of([other, own, call])
    assert [run.span_id for run in episode.agent_runs] == [own.span_id]
    assert [call.agent_name for call in episode.calls] == ["writer"]


def test_a_later_equal_call_of_another_instrumentation_is_another() -> None:
    first = foreign(adapter_call(1, messages=[user("q")]), "framework")
    later = foreign(adapter_call(100, messages=[user("q")]), "client")
    assert len(episode_of([first, later]).calls) == 2


def test_a_tool_call_seen_twice_is_one_and_its_failure_counts() -> None:
    other = foreign(tool(1, result="it failed", end_ns=90))
    own = ours(tool(2, status=ToolStatus.RAISED, call_id="c1", end_ns=80))
    (call,) = episode_of([other, own]).tool_calls
    assert (call.span_id, call.status, call.call_id) == (own.span_id, ToolStatus.RAISED, "c1")


@pytest.mark.parametrize("ours_first", [True, False])
def test_arguments_that_one_writer_spoilt_do_not_make_two_tool_calls(ours_first: bool) -> None:
    """OpenInference writes {"a": "z"}, which does not validate, as "z"."""
    other = foreign(tool(1 + ours_first, arguments="z", status=ToolStatus.BAD_ARGUMENTS, end_ns=90))
    own = ours(tool(2 - ours_first, arguments='{"a": "z"}', status=ToolStatus.BAD_ARGUMENTS, end_ns=90))
    (call,) = episode_of([other, own]).tool_calls
    assert call.arguments == {"a": "z"}


def test_parallel_tool_calls_seen_twice_stay_apart() -> None:
    both = [
        foreign(tool(i, arguments=json.dumps({"a": i % 2}), call_id=f"c{i % 2}", end_ns=90), scope)
        for i, scope in enumerate(["framework", "framework", "core", "core"])
    ]
    assert [call.call_id for call in episode_of(both).tool_calls] == ["c0", "c1"]


def test_a_reward_for_a_span_that_was_merged_reaches_the_call() -> None:
    outer = foreign(adapter_call(1, messages=[user("q")], end_ns=90))
    inner = foreign(adapter_call(2, messages=[user("q")], parent_id=outer.span_id), "client")
    sampled = gateway_call(3, [1], [2], parent_id=inner.span_id)
    episode = episode_of([outer, inner, sampled, reward(99, 0.5, target=inner.span_id)])
    assert [t.reward for t in episode.transitions] == [0.5]
    assert not episode.untrainable


# --- the join with the gateway -------------------------------------------------------------------


def test_the_span_of_an_http_client_between_call_and_gateway_is_looked_through() -> None:
    asked = foreign(adapter_call(1, agent="writer", end_ns=90))
    post = span("POST", 2, {"http.request.method": "POST"}, parent_id=asked.span_id)
    sampled = gateway_call(3, [1], [2], parent_id=post.span_id)
    (call,) = join_calls(read_trace([asked, post, sampled])).calls
    assert (call.span_id, call.agent_name) == (asked.span_id, "writer")


def test_an_agents_border_ends_the_search_for_the_caller() -> None:
    asked = foreign(adapter_call(1, messages=[user("plan")], end_ns=90))
    helper = agent_run(2, "helper", parent_id=asked.span_id)
    sampled = gateway_call(3, [1], [2], messages=[user("help")], parent_id=helper.span_id)
    calls = join_calls(read_trace([asked, helper, sampled])).calls
    assert [call.agent_name for call in calls] == [None, "helper"]


SAME_REQUEST: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"role": "system", "content": "s"}, {"role": "developer", "content": "s"}),
    ({"role": "user", "content": "q"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}),
    ({"role": "user", "content": "q"}, {"role": "user", "content": "q", "name": "user"}),
    ({"role": "assistant", "content": None}, {"role": "assistant"}),
    ({"role": "assistant", "content": ""}, {"role": "assistant", "refusal": None, "annotations": []}),
    (
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "tool", "tool_call_id": None, "content": "3"},
    ),
    (
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a":1,"b":2}'}}],
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "d", "type": "function", "function": {"name": "f", "arguments": {"b": 2, "a": 1}}}
            ],
        },
    ),
]


@pytest.mark.parametrize(("one", "other"), SAME_REQUEST)
def test_requests_are_compared_by_what_every_writer_keeps(one: Any, other: Any) -> None:
    assert request_key([one]) == request_key([other])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (user("q"), user("r")),
        (user("q"), {"role": "assistant", "content": "q"}),
        (user("q"), {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "q"}}]}),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 2}'}}]},
        ),
    ],
)
def test_requests_that_differ_have_different_keys(one: Any, other: Any) -> None:
    assert request_key([one]) != request_key([other])


@pytest.mark.parametrize("name", EXPECTED)
def test_what_the_gateway_sampled_meets_a_foreign_trace(name: str) -> None:
    """Without `traceparent`: by response id where the trace has one, else by the request alone."""
    spans = sample(name)
    asked = episode_of(spans).calls
    served = [
        gateway_call(
            call.start_ns + 1,
            [i],
            [i + 10],
            messages=call.messages,
            output=call.output,
            extra={semconv.RESPONSE_ID: call.response_id} if call.response_id else None,
            trace_id="b" * 32,
        )
        for i, call in enumerate(asked)
    ]
    episode = episode_of([*spans, *served])
    assert [call.span_id for call in episode.calls] == [call.span_id for call in asked]
    assert [t.response_ids.tolist() for t in episode.transitions] == [[10], [11], [12]]
    assert [t.agent_name for t in episode.transitions] == [EXPECTED[name].agent] * 3
