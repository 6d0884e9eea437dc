# pyright: reportUnknownMemberType=false
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent, SocietyOfMindAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import TextMessage
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow, RoundRobinGroupChat, SelectorGroupChat, Swarm
from autogen_agentchat.tools import AgentTool
from autogen_core import CancellationToken
from autogen_core.models import ModelInfo, SystemMessage, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel
from tests.adapters.recorded import Recorded, answered, recording, sent
from tests.adapters.scripted_server import ScriptedServer, call, fail, say, stall
from tests.core.span_receiver import without_ids_and_times

import agentlightning_autogen
from agentlightning import semconv
from agentlightning.context import ENV_TRACER, ENV_URL, ActiveRollout, open_span, use_rollout
from agentlightning.rewards import emit_reward
from agentlightning.tracing import configure
from agentlightning.tracing.guard import failures
from agentlightning.types import Reward, Span, SpanStatus
from agentlightning_autogen import llm as adapter_llm

INFO = ModelInfo(
    vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True
)


class Answer(BaseModel):
    a: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def boom(x: str) -> str:
    """Always fails."""
    raise RuntimeError(f"tool broke {x}")


def validates(x: str) -> str:
    """Fails with the library's error of its own schema, from the inside."""
    return str(Answer.model_validate({"a": x}))


@pytest.fixture(autouse=True)
def instrumented() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    agentlightning_autogen.instrument()
    yield
    agentlightning_autogen.uninstrument()


_clients: list[OpenAIChatCompletionClient] = []


def client(server: ScriptedServer, model: str = "m", **settings: Any) -> OpenAIChatCompletionClient:
    given: dict[str, Any] = {"api_key": "k", "model_info": INFO, "max_retries": 0, **settings}
    made = OpenAIChatCompletionClient(model=model, base_url=server.openai_url, **given)
    _clients.append(made)
    return made


def agent(name: str, server: ScriptedServer, model: str = "m", **settings: Any) -> AssistantAgent:
    given: dict[str, Any] = {"system_message": "sys", "max_tool_iterations": 5, "description": name}
    model_client = settings.pop("model_client", None) or client(server, model)
    return AssistantAgent(name, model_client, **{**given, **settings})


def run(main: Callable[[], Any]) -> Any:
    """What the coroutine function gives; the HTTP clients made for it are closed in its event loop."""

    async def body() -> Any:
        try:
            return await main()
        finally:
            while _clients:
                await _clients.pop().close()

    return asyncio.run(body())


def test_a_run_is_recorded_call_by_call(server: ScriptedServer) -> None:
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    model_client = client(server, temperature=0.5, max_tokens=9, seed=3, stop=["END"])
    run(lambda: agent("calc", server, model_client=model_client, tools=[add]).run(task="go"))
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [
        ("invoke_agent calc", None),
        ("chat m", "invoke_agent calc"),
        ("execute_tool add", "invoke_agent calc"),
        ("chat m", "invoke_agent calc"),
    ]
    assert [span.attributes[semconv.AGENT_NAME] for span in seen.spans] == ["calc"] * 4
    first, second = seen.llm
    assert answered(first)["tool_calls"] == server.requests[0].reply.message["tool_calls"]
    assert answered(second) == {"role": "assistant", "content": "three"}
    assert json.loads(str(first.attributes[semconv.TOOL_DEFINITIONS])) == server.requests[0].body["tools"]
    expected = {
        semconv.REQUEST_MODEL: "m",
        semconv.REQUEST_TEMPERATURE: 0.5,
        semconv.REQUEST_MAX_TOKENS: 9,
        semconv.REQUEST_SEED: 3,
        semconv.REQUEST_STOP: ["END"],
        semconv.RESPONSE_ID: server.requests[0].response_id,
        semconv.RESPONSE_MODEL: "m",
        semconv.RESPONSE_FINISH_REASONS: ["tool_calls"],
        semconv.USAGE_INPUT: 7,
        semconv.USAGE_OUTPUT: 4,
    }
    assert {key: first.attributes.get(key) for key in expected} == expected
    (tool,) = seen.tools
    assert (tool.attributes[semconv.TOOL_ARGUMENTS], tool.attributes[semconv.TOOL_RESULT]) == (
        '{"a": 1, "b": 2}',
        "3",
    )
    assert first.end_ns <= tool.start_ns <= tool.end_ns <= second.start_ns


def test_every_way_a_tool_call_ends_is_told_apart(server: ScriptedServer) -> None:
    server.given(
        call(
            ("add", {"a": 1, "b": 2}),
            ("boom", {"x": "q"}),
            ("nope", {}),
            ("add", {"a": "z"}),
            ("add", "{not json"),
            ("validates", {"x": "z"}),
        )
    )
    run(lambda: agent("calc", server, tools=[add, boom, validates]).run(task="go"))
    seen = Recorded(server)
    assert seen.tool_statuses() == {
        "add_0": "ok",
        "boom_1": "raised",
        "nope_2": "unknown_tool",
        "add_3": "bad_arguments",
        "add_4": "bad_arguments",
        "validates_5": "raised",
    }
    broken = seen.one("execute_tool boom")
    assert (broken.status, broken.status_message) == (SpanStatus.ERROR, "tool broke q")
    assert broken.attributes[semconv.ERROR_TYPE] == "RuntimeError"
    unparsed = next(s for s in seen.tools if s.attributes[semconv.TOOL_ARGUMENTS] == "{not json")
    assert unparsed.status is SpanStatus.ERROR
    assert all(span.end_ns >= span.start_ns > 0 for span in seen.spans)


def test_a_nested_agent_in_a_team_keeps_its_name_and_place(server: ScriptedServer) -> None:
    server.given(call(("helper", {"task": "do"})), say("fin"), model="outer").given(
        say("help"), model="inner"
    )

    async def main() -> None:
        helper = agent("helper", server, "inner")
        outer = agent("boss", server, "outer", tools=[AgentTool(helper)])
        await RoundRobinGroupChat([outer], max_turns=1).run(task="go")

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [
        ("invoke_agent RoundRobinGroupChat", None),
        ("invoke_agent boss", "invoke_agent RoundRobinGroupChat"),
        ("chat outer", "invoke_agent boss"),
        ("execute_tool helper", "invoke_agent boss"),
        ("invoke_agent helper", "execute_tool helper"),
        ("chat inner", "invoke_agent helper"),
        ("chat outer", "invoke_agent boss"),
    ]
    assert [span.attributes[semconv.AGENT_NAME] for span in seen.llm] == ["boss", "helper", "boss"]
    assert len({span.trace_id for span in seen.spans}) == 1


@pytest.mark.parametrize("usage", [True, False])
def test_a_streamed_answer_is_one_call_like_any_other(server: ScriptedServer, usage: bool) -> None:
    server.given(call(("add", {"a": 1, "b": 2}), text="let me see"), say("three"))
    settings: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}

    async def main() -> None:
        model_client = client(server, **settings)
        streaming = agent("calc", server, model_client=model_client, tools=[add], model_client_stream=True)
        async for _ in streaming.run_stream(task="go"):
            assert open_span() is None  # the agent's spans are not the consumer's

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    assert len(seen.llm) == 2
    first, second = seen.llm
    assert answered(first) == server.requests[0].reply.message
    assert answered(second) == {"role": "assistant", "content": "three"}
    assert first.attributes[semconv.RESPONSE_FINISH_REASONS] == ["tool_calls"]
    assert first.attributes[semconv.REQUEST_STREAM] is True
    assert first.attributes.get(semconv.USAGE_OUTPUT) == (4 if usage else None)
    assert seen.tree()[0] == ("invoke_agent calc", None)


def test_two_rollouts_at_once_keep_apart(server: ScriptedServer) -> None:
    rewards: dict[str, list[Reward]] = {"a": [], "b": []}

    def score() -> str:
        """A plain function, which AutoGen runs in a thread."""
        emit_reward(0.5)
        return "scored"

    async def one(name: str) -> None:
        server.given(call(("score", {})), model=name)
        flow = DiGraphBuilder()
        first, left, right = (
            agent(f"{name}_{role}", server, name, tools=[score]) for role in ("first", "left", "right")
        )
        flow.add_node(first).add_node(left).add_node(right).add_edge(first, left).add_edge(first, right)
        active = ActiveRollout(name, f"{name}-1", server.openai_url, report_reward=rewards[name].append)
        with use_rollout(active):
            await GraphFlow([first, left, right], graph=flow.build()).run(task="go")

    async def main() -> None:
        await asyncio.gather(one("a"), one("b"))

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    assert len(seen.llm) == 8
    for span in seen.spans:
        assert span.attempt_id == f"{span.rollout_id}-1"
        if semconv.REQUEST_MODEL in span.attributes:
            assert span.attributes[semconv.REQUEST_MODEL] == span.rollout_id
            assert str(span.attributes[semconv.AGENT_NAME]).startswith(f"{span.rollout_id}_")
    assert {span.trace_id for span in seen.agents if span.rollout_id == "a"}.isdisjoint(
        span.trace_id for span in seen.agents if span.rollout_id == "b"
    )
    assert [len(given) for given in rewards.values()] == [1, 1]


def test_runs_in_threads_keep_apart(server: ScriptedServer) -> None:
    def work(name: str) -> None:
        with use_rollout(ActiveRollout(name, f"{name}-1", server.openai_url)):
            asyncio.run(main(name))

    async def main(name: str) -> None:
        model_client = client(server, name)
        await agent(name, server, model_client=model_client).run(task="go")
        await model_client.close()
        _clients.remove(model_client)

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = Recorded(server)
    seen.assert_joined()
    assert sorted((s.rollout_id, s.attributes[semconv.AGENT_NAME]) for s in seen.llm) == [
        (f"t{i}", f"t{i}") for i in range(4)
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_error_is_the_calls_and_the_agents_error(server: ScriptedServer, streamed: bool) -> None:
    server.given(fail(500))
    with pytest.raises(Exception, match="scripted 500"):
        run(lambda: agent("calc", server, model_client_stream=streamed).run(task="go"))
    seen = Recorded(server)
    assert [(span.name, span.status) for span in seen.spans] == [
        ("invoke_agent calc", SpanStatus.ERROR),
        ("chat m", SpanStatus.ERROR),
    ]
    assert seen.llm[0].attributes[semconv.ERROR_TYPE] == "InternalServerError"
    assert semconv.OUTPUT_MESSAGES not in seen.llm[0].attributes
    assert seen.llm[0].span_id in server.requests[0].headers["traceparent"]


def test_a_server_error_in_a_team_ends_every_span(server: ScriptedServer) -> None:
    server.given(fail(500))
    with pytest.raises(RuntimeError, match="scripted 500"):
        run(lambda: RoundRobinGroupChat([agent("calc", server)], max_turns=1).run(task="go"))
    assert {span.name: span.status for span in Recorded(server).spans} == {
        "invoke_agent RoundRobinGroupChat": SpanStatus.ERROR,
        "invoke_agent calc": SpanStatus.ERROR,
        "chat m": SpanStatus.ERROR,
    }


def test_a_retried_request_is_one_call(server: ScriptedServer) -> None:
    server.given(fail(429), say("ok"))
    run(lambda: agent("calc", server, model_client=client(server, max_retries=2)).run(task="go"))
    seen = Recorded(server)
    seen.assert_joined(answered=1)
    assert len(server.requests) == 2
    assert len({request.headers["traceparent"] for request in server.requests}) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cancelled_run_closes_its_spans(server: ScriptedServer, streamed: bool) -> None:
    server.given(stall())

    async def main() -> None:
        token = CancellationToken()
        calc = agent("calc", server, model_client_stream=streamed)
        task = asyncio.create_task(calc.run(task="go", cancellation_token=token))
        assert await asyncio.to_thread(server.stalled.wait, 10)
        token.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.release.set()

    run(main)
    seen = Recorded(server)
    assert [(span.name, span.attributes[semconv.ERROR_TYPE]) for span in seen.spans] == [
        ("invoke_agent calc", "CancelledError"),
        ("chat m", "CancelledError"),
    ]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # AutoGen's own
def test_structured_output_is_recorded_as_it_was_said(server: ScriptedServer) -> None:
    server.given(say('{"a": 1}'))
    result = run(lambda: agent("calc", server, output_content_type=Answer).run(task="go"))
    assert result.messages[-1].content == Answer(a=1)
    seen = Recorded(server)
    seen.assert_joined()
    assert answered(seen.llm[0]) == {"role": "assistant", "content": '{"a": 1}'}


def test_the_selectors_own_call_belongs_to_the_team(server: ScriptedServer) -> None:
    server.given(say("second"), say("done"))

    async def main() -> None:
        pair: list[Any] = [agent("first", server, "a"), agent("second", server, "b")]
        team = SelectorGroupChat(pair, client(server), termination_condition=MaxMessageTermination(2))
        await team.run(task="go")

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    assert [(s.name, s.attributes[semconv.AGENT_NAME]) for s in seen.llm] == [
        ("chat m", "SelectorGroupChat"),
        ("chat b", "second"),
    ]


def test_a_handoff_is_a_tool_call_and_the_next_agent_has_its_own_name(server: ScriptedServer) -> None:
    server.given(call(("transfer_to_bob", {})), model="a").given(say("I am Bob"), model="b")

    async def main() -> None:
        alice = agent("alice", server, "a", handoffs=["bob"])
        bob = agent("bob", server, "b")
        await Swarm([alice, bob], termination_condition=MaxMessageTermination(4), max_turns=2).run(task="go")

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    assert [span.attributes[semconv.AGENT_NAME] for span in seen.llm] == ["alice", "bob"]
    assert seen.tool_statuses() == {"transfer_to": "ok"}
    assert seen.parent(seen.one("invoke_agent bob")) == "invoke_agent Swarm"


def test_a_team_inside_an_agent_nests(server: ScriptedServer) -> None:
    async def main() -> None:
        inner = RoundRobinGroupChat([agent("thinker", server, "inner")], max_turns=1)
        await SocietyOfMindAgent("mind", inner, client(server)).run(task="go")

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    thinker, summary = seen.llm
    assert seen.parent(thinker) == "invoke_agent thinker"
    assert seen.parent(seen.one("invoke_agent RoundRobinGroupChat")) == "invoke_agent mind"
    assert seen.parent(summary) == "invoke_agent mind"
    assert summary.attributes[semconv.AGENT_NAME] == "mind"


def test_messages_given_to_an_agent_directly_make_a_run(server: ScriptedServer) -> None:
    async def main() -> None:
        await agent("calc", server).on_messages(
            [TextMessage(content="go", source="user")], CancellationToken()
        )

    run(main)
    assert Recorded(server).tree() == [("invoke_agent calc", None), ("chat m", "invoke_agent calc")]


def test_a_client_without_an_agent_is_recorded_as_a_bare_call(server: ScriptedServer) -> None:
    async def main() -> None:
        await client(server).create([UserMessage(content="hi", source="u")])
        async for _ in client(server).create_stream([UserMessage(content="hi", source="u")]):
            assert open_span() is None
        assert open_span() is None

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [("chat m", None), ("chat m", None)]
    assert [semconv.AGENT_NAME in span.attributes for span in seen.llm] == [False, False]


def test_a_stream_that_its_reader_leaves_early_is_closed(server: ScriptedServer) -> None:
    server.given(say("a long answer"))

    async def main() -> None:
        stream = client(server).create_stream([UserMessage(content="hi", source="u")])
        async with contextlib.aclosing(stream):
            async for _ in stream:
                break

    run(main)
    (span,) = Recorded(server).llm
    assert span.attributes[semconv.ERROR_TYPE] == "GeneratorExit"


def test_a_tool_that_code_runs_by_itself_is_recorded(server: ScriptedServer) -> None:
    async def main() -> None:
        tool = FunctionTool(add, description="adds")
        assert await tool.run_json({"a": 1, "b": 2}, CancellationToken()) == 3
        with pytest.raises(Exception, match="validation"):
            await tool.run_json({"a": "z"}, CancellationToken())
        with pytest.raises(RuntimeError, match="broke"):
            await FunctionTool(boom, description="").run_json({"x": "q"}, CancellationToken())

    run(main)
    statuses = [span.attributes[semconv.TOOL_STATUS] for span in Recorded(server).tools]
    assert statuses == ["ok", "bad_arguments", "raised"]


def test_without_a_server_nothing_is_recorded_and_the_agent_works(server: ScriptedServer) -> None:
    configure("")
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    result = run(lambda: agent("calc", server, tools=[add]).run(task="go"))
    assert result.messages[-1].content == "three"
    assert "traceparent" not in server.requests[0].headers
    assert server.spans == []


def test_a_hook_that_fails_does_not_reach_the_agent(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("bug in the adapter")

    monkeypatch.setattr(adapter_llm, "start_llm", broken)
    monkeypatch.setattr("agentlightning_autogen.tools.start_tool", broken)
    monkeypatch.setattr("agentlightning_autogen.agents.start_agent", broken)
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    before = failures.total()
    result = run(lambda: agent("calc", server, tools=[add]).run(task="go"))
    assert result.messages[-1].content == "three"
    assert failures.total() >= before + 4  # one run, two model calls, one tool call


def test_instrumenting_twice_records_once_and_undoing_it_records_nothing(server: ScriptedServer) -> None:
    agentlightning_autogen.instrument()
    run(lambda: agent("calc", server).run(task="go"))
    assert len(Recorded(server).llm) == 1
    agentlightning_autogen.uninstrument()
    run(lambda: agent("calc", server).run(task="go"))
    assert len(Recorded(server).llm) == 1
    assert "traceparent" not in server.requests[1].headers


def test_what_is_sent_is_recorded_even_where_autogen_rewrites_it(server: ScriptedServer) -> None:
    async def main() -> None:
        messages = [
            SystemMessage(content="a"),
            SystemMessage(content="b"),
            UserMessage(content="c", source="u"),
        ]
        await client(server).create(messages)

    run(main)
    seen = Recorded(server)
    assert sent(seen.llm[0])[0] == {"role": "system", "content": "a\nb"}
    seen.assert_joined()


def test_both_tracers_record_the_same() -> None:
    def shape(tracer: str) -> list[Span]:
        with recording(tracer) as server:
            server.given(call(("add", {"a": 1, "b": 2}), ("nope", {})), say("three"))
            run(lambda: agent("calc", server, tools=[add]).run(task="go"))
            return without_ids_and_times(Recorded(server).spans)

    assert shape("light") == shape("otel")


AGENT_SCRIPT = """
import asyncio, sys
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
info = dict(vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True)
client = OpenAIChatCompletionClient(model="m", base_url=sys.argv[1], api_key="k", model_info=info)
asyncio.run(AssistantAgent("unmodified", client).run(task="go"))
"""


@pytest.mark.parametrize("tracer", ["light", "otel"])
def test_opentelemetry_instrument_records_an_unmodified_script(tracer: str, tmp_path: Any) -> None:
    (script := tmp_path / "agent.py").write_text(AGENT_SCRIPT)
    command = os.path.join(os.path.dirname(sys.executable), "opentelemetry-instrument")
    with ScriptedServer() as server:
        done = subprocess.run(
            [command, sys.executable, str(script), server.openai_url],
            env={**os.environ, ENV_URL: server.url, ENV_TRACER: tracer},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        names = sorted(span.name for span in server.spans)
    assert names == ["chat m", "invoke_agent unmodified"]
