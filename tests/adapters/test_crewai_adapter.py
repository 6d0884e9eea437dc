# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false, reportDeprecated=false, reportPrivateImportUsage=false

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import tests.adapters.quiet_crewai  # pyright: ignore[reportUnusedImport]  # noqa: F401

pytest.importorskip("crewai")

from crewai import LLM, Agent, Crew, Flow, Process, Task
from crewai.agents import step_executor
from crewai.events import crewai_event_bus
from crewai.flow.flow import listen, start
from crewai.lite_agent import LiteAgent
from crewai.llms.providers.openai.completion import OpenAICompletion
from crewai.tools import tool
from crewai.tools.tool_failure import ToolExecutionFailedError, ToolFailure, ToolFailurePolicy
from crewai.types.streaming import CrewStreamingOutput
from openai import _base_client
from pydantic import BaseModel
from tests.adapters.recorded import Recorded, answered, recording, sent
from tests.adapters.scripted_server import Reply, Request, ScriptedServer, call, fail, say, stall
from tests.core.span_receiver import send, without_ids_and_times

import agentlightning_crewai
from agentlightning import semconv
from agentlightning.context import ENV_TRACER, ENV_URL, ActiveRollout, open_span, use_rollout
from agentlightning.rewards import emit_reward
from agentlightning.tracing import configure, trace
from agentlightning.tracing.guard import failures
from agentlightning.types import Reward, Span, SpanStatus, live_rollout_id
from agentlightning_crewai import LightningEventListener

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai", "ignore:LiteAgent is deprecated")


class Answer(BaseModel):
    a: int


@tool("add")
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool("boom")
def boom(x: str) -> str:
    """Always fails."""
    raise RuntimeError(f"tool broke {x}")


@tool("soft")
def soft(x: str) -> Any:
    """Says by itself that it failed."""
    return ToolFailure(message=f"no luck with {x}")


@tool("validates")
def validates(x: str) -> str:
    """Fails with the library's error of another schema, from the inside."""
    return str(Answer.model_validate({"a": x}))


@pytest.fixture(autouse=True)
def instrumented() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    agentlightning_crewai.instrument()
    yield
    crewai_event_bus.flush()
    agentlightning_crewai.uninstrument()
    while _models:
        _models.pop()._client.close()


_models: list[Any] = []


def model(server: ScriptedServer, name: str = "m", **settings: Any) -> Any:
    given: dict[str, Any] = {
        "provider": "openai",
        "base_url": server.openai_url,
        "api_key": "k",
        "max_retries": 0,
    }
    _models.append(LLM(model=name, **{**given, **settings}))
    return _models[-1]


def agent(role: str, server: ScriptedServer, name: str = "m", **settings: Any) -> Agent:
    llm = settings.pop("llm", None) or model(server, name)
    return Agent(role=role, goal="g", backstory="b", llm=llm, max_retry_limit=0, **settings)


def crew(*agents: Agent, **settings: Any) -> Crew:
    tasks = settings.pop("tasks", None) or [
        Task(description=f"do {i}", expected_output="x", agent=worker, name=f"t{i}")
        for i, worker in enumerate(agents)
    ]
    return Crew(agents=list(agents), tasks=tasks, **settings)


def run(main: Callable[[], Any]) -> Any:
    """What the coroutine function gives; the HTTP clients used in it are closed in its event loop."""

    async def body() -> Any:
        try:
            return await main()
        finally:
            for used in _models:
                await used._async_client.close()

    return asyncio.run(body())


ONE_CREW = [
    ("invoke_agent crew", None),
    ("invoke_agent calc", "invoke_agent crew"),
    ("chat m", "invoke_agent calc"),
    ("execute_tool add", "invoke_agent calc"),
    ("chat m", "invoke_agent calc"),
]


def test_a_kickoff_is_recorded_call_by_call(server: ScriptedServer) -> None:
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    llm = model(server, temperature=0.5, max_tokens=9, seed=3, additional_params={"stop": ["END"]})
    crew(agent("calc\n", server, llm=llm, tools=[add])).kickoff()
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == ONE_CREW
    assert [s.attributes[semconv.AGENT_NAME] for s in seen.spans] == ["crew", "calc", "calc", "calc", "calc"]
    assert [s.attributes[semconv.NODE_PATH] for s in seen.spans] == ["crew"] + ["crew/t0/calc"] * 4
    first, second = seen.llm
    assert answered(first)["tool_calls"] == server.requests[0].reply.message["tool_calls"]
    assert answered(second) == {"role": "assistant", "content": "three"}
    assert json.loads(str(first.attributes[semconv.TOOL_DEFINITIONS])) == server.requests[0].body["tools"]
    expected = {
        semconv.REQUEST_MODEL: "m",
        semconv.REQUEST_TEMPERATURE: 0.5,
        semconv.REQUEST_MAX_TOKENS: 9,
        semconv.REQUEST_SEED: 3,
        semconv.RESPONSE_ID: server.requests[0].response_id,
        semconv.RESPONSE_MODEL: "m",
        semconv.RESPONSE_FINISH_REASONS: ["tool_calls"],
        semconv.USAGE_INPUT: 7,
        semconv.USAGE_OUTPUT: 4,
    }
    assert {key: first.attributes.get(key) for key in expected} == expected
    (added,) = seen.tools
    assert added.attributes[semconv.TOOL_ARGUMENTS] == '{"a":1,"b":2}'
    assert added.attributes[semconv.TOOL_RESULT] == "3"
    assert first.end_ns <= added.start_ns <= added.end_ns <= second.start_ns


def kickoff(made: Crew) -> None:
    made.kickoff()


def kickoff_async(made: Crew) -> None:
    asyncio.run(made.kickoff_async())


def akickoff(made: Crew) -> None:
    asyncio.run(made.akickoff())


def kickoff_in_a_thread(made: Crew) -> None:
    thread = threading.Thread(target=made.kickoff)
    thread.start()
    thread.join()


def kickoff_for_each(made: Crew) -> None:
    made.kickoff_for_each([{}])


@pytest.mark.parametrize("way", [kickoff_async, akickoff, kickoff_in_a_thread, kickoff_for_each])
@pytest.mark.parametrize("stream", [False, True])
def test_every_way_to_start_a_crew_gives_the_same_spans(
    server: ScriptedServer, way: Callable[[Crew], None], stream: bool
) -> None:
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    way(crew(agent("calc", server, llm=model(server, stream=stream), tools=[add])))
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == ONE_CREW
    assert len({span.trace_id for span in seen.spans}) == 1
    assert [s.attributes[semconv.AGENT_NAME] for s in seen.llm] == ["calc", "calc"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_streamed_crew_is_recorded_while_it_is_read(server: ScriptedServer, asynchronous: bool) -> None:
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    streaming = crew(agent("calc", server, tools=[add]), stream=True)

    async def main() -> None:
        output = await streaming.akickoff()
        assert isinstance(output, CrewStreamingOutput)
        async for _ in output:
            assert open_span() is None  # the crew's spans are not the reader's

    if asynchronous:
        run(main)
    else:
        output = streaming.kickoff()
        assert isinstance(output, CrewStreamingOutput)
        assert "".join(chunk.content for chunk in output).endswith("three")
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == ONE_CREW
    first, second = seen.llm
    assert first.attributes[semconv.REQUEST_STREAM] is True
    assert answered(first)["tool_calls"] == server.requests[0].reply.message["tool_calls"]
    assert answered(second) == {"role": "assistant", "content": "three"}
    assert first.attributes[semconv.RESPONSE_FINISH_REASONS] == ["tool_calls"]
    assert first.attributes[semconv.RESPONSE_ID] == server.requests[0].response_id
    assert first.attributes[semconv.USAGE_OUTPUT] == 4


def test_every_way_a_tool_call_ends_is_told_apart(server: ScriptedServer) -> None:
    server.given(
        call(
            ("add", {"a": 1, "b": 2}),
            ("boom", {"x": "q"}),
            ("nope", {}),
            ("add", {"a": "z"}),
            ("add", "{not json"),
            ("validates", {"x": "z"}),
            ("soft", {"x": "s"}),
        )
    )
    crew(agent("calc", server, tools=[add, boom, soft, validates])).kickoff()
    seen = Recorded(server)
    assert seen.tool_statuses() == {
        "add_0": "ok",
        "boom_1": "raised",
        "nope_2": "unknown_tool",
        "add_3": "bad_arguments",
        "add_4": "bad_arguments",
        "validates_5": "raised",
        "soft_6": "raised",
    }
    broken = seen.one("execute_tool boom")
    assert (broken.status, broken.status_message) == (SpanStatus.ERROR, "tool broke q")
    assert broken.attributes[semconv.ERROR_TYPE] == "RuntimeError"
    assert seen.one("execute_tool soft").status_message == "no luck with s"
    unparsed = next(s for s in seen.tools if s.attributes[semconv.TOOL_ARGUMENTS] == "{not json")
    assert unparsed.status is SpanStatus.ERROR
    assert {seen.parent(span) for span in seen.tools} == {"invoke_agent calc"}
    told = [m for m in server.requests[1].body["messages"] if m["role"] == "tool"]
    results = {s.attributes[semconv.TOOL_CALL_ID]: s.attributes[semconv.TOOL_RESULT] for s in seen.tools}
    assert results == {m["tool_call_id"]: m["content"] for m in told}


def test_a_failure_that_ends_the_run_has_its_status(server: ScriptedServer) -> None:
    server.given(call(("boom", {"x": "q"})))
    strict = agent("calc", server, tools=[boom], tool_failure_policy=ToolFailurePolicy.RAISE)
    with pytest.raises(ToolExecutionFailedError):
        crew(strict).kickoff()
    seen = Recorded(server)
    assert [(s.name, s.status) for s in seen.spans if s.name != "chat m"] == [
        ("invoke_agent crew", SpanStatus.ERROR),
        ("invoke_agent calc", SpanStatus.ERROR),
        ("execute_tool boom", SpanStatus.ERROR),
    ]
    assert seen.tools[0].attributes[semconv.ERROR_TYPE] == "RuntimeError"


def action(name: str, arguments: str) -> Any:
    return say(f"Thought: hm\nAction: {name}\nAction Input: {arguments}")


TEXT = "o1"  # a model that CrewAI takes to have no function calling


def test_tools_of_the_text_loop_are_told_apart_too(server: ScriptedServer) -> None:
    server.given(
        action("add", '{"a": 1, "b": 2}'),
        action("boom", '{"x": "q"}'),
        action("nope", "{}"),
        action("add", '{"a": "z", "b": 1}'),
        say("Thought: I now know\nFinal Answer: done"),
        model=TEXT,
    )
    crew(agent("calc", server, TEXT, tools=[add, boom])).kickoff()
    seen = Recorded(server)
    seen.assert_joined()
    assert "tools" not in server.requests[0].body
    tools = [(s.attributes[semconv.TOOL_NAME], s.attributes[semconv.TOOL_STATUS]) for s in seen.tools]
    assert tools == [("add", "ok"), ("boom", "raised"), ("nope", "unknown_tool"), ("add", "bad_arguments")]
    added, broken, *_ = seen.tools
    assert added.attributes[semconv.TOOL_ARGUMENTS] == '{"a":1,"b":2}'
    assert "3" in str(added.attributes[semconv.TOOL_RESULT])
    assert (broken.status_message, broken.attributes[semconv.ERROR_TYPE]) == ("tool broke q", "RuntimeError")
    assert {event.name for event in broken.events} == {"retry"}  # CrewAI tried it again by itself


def test_a_tool_of_the_text_loop_that_works_the_second_time_is_ok(server: ScriptedServer) -> None:
    tries: list[str] = []

    @tool("flaky")
    def flaky(x: str) -> str:
        """Works from the third try on."""
        tries.append(x)
        if len(tries) < 3:
            raise RuntimeError("not yet")
        return "worked"

    server.given(action("flaky", '{"x": "q"}'), say("Thought: ok\nFinal Answer: done"), model=TEXT)
    crew(agent("calc", server, TEXT, tools=[flaky])).kickoff()
    (span,) = Recorded(server).tools
    assert span.attributes[semconv.TOOL_STATUS] == "ok"
    assert span.status is not SpanStatus.ERROR
    assert len(span.events) == 1  # one failed round, of two tries


def test_text_that_holds_no_arguments_is_bad_arguments(server: ScriptedServer) -> None:
    server.given(action("add", "12"), say("Thought: ok\nFinal Answer: done"), model=TEXT)
    crew(agent("calc", server, TEXT, tools=[add])).kickoff()
    (span,) = Recorded(server).tools
    assert span.attributes[semconv.TOOL_STATUS] == "bad_arguments"


DELEGATE = "delegate_work_to_coworker"


def managed(server: ScriptedServer) -> Crew:
    task = Task(description="do", expected_output="x", name="t")
    boss, worker = agent("boss", server, "outer"), agent("helper", server, "inner")
    return crew(worker, tasks=[task], process=Process.hierarchical, manager_agent=boss)


@pytest.mark.parametrize("way", [kickoff, akickoff])
def test_a_delegated_task_is_a_nested_run(server: ScriptedServer, way: Callable[[Crew], None]) -> None:
    delegated = {"task": "ask", "context": "c", "coworker": "helper"}
    server.given(call((DELEGATE, delegated)), say("outer says"), model="outer")
    server.given(say("inner says"), model="inner")
    way(managed(server))
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [
        ("invoke_agent crew", None),
        ("invoke_agent boss", "invoke_agent crew"),
        ("chat outer", "invoke_agent boss"),
        (f"execute_tool {DELEGATE}", "invoke_agent boss"),
        ("invoke_agent helper", f"execute_tool {DELEGATE}"),
        ("chat inner", "invoke_agent helper"),
        ("chat outer", "invoke_agent boss"),
    ]
    assert [s.attributes[semconv.AGENT_NAME] for s in seen.llm] == ["boss", "helper", "boss"]
    assert seen.llm[1].attributes[semconv.NODE_PATH] == "crew/t/boss/helper"
    assert len({span.trace_id for span in seen.spans}) == 1


def test_a_delegation_that_fails_says_so(server: ScriptedServer) -> None:
    delegated = {"task": "ask", "context": "c", "coworker": "helper"}
    unknown = {**delegated, "coworker": "nobody"}
    server.given(call((DELEGATE, delegated), (DELEGATE, unknown)), say("done"), model="outer")
    server.given(fail(500), model="inner")
    managed(server).kickoff()
    seen = Recorded(server)
    ended = {str(s.attributes[semconv.TOOL_STATUS]): s.attributes for s in seen.tools}  # they ran at once
    assert {status: attributes[semconv.ERROR_TYPE] for status, attributes in ended.items()} == {
        "raised": "InternalServerError",
        "bad_arguments": "ValueError",
    }
    assert "scripted 500" in str(ended["raised"][semconv.TOOL_RESULT])


def test_tasks_at_once_keep_their_agents(server: ScriptedServer) -> None:
    pair = [agent("first", server, "a"), agent("second", server, "b"), agent("third", server, "c")]
    tasks = [
        Task(description="d", expected_output="x", agent=worker, async_execution=i < 2)
        for i, worker in enumerate(pair)
    ]
    crew(*pair, tasks=tasks).kickoff()
    seen = Recorded(server)
    seen.assert_joined()
    assert sorted((s.name, s.attributes[semconv.AGENT_NAME], seen.parent(s)) for s in seen.llm) == [
        ("chat a", "first", "invoke_agent first"),
        ("chat b", "second", "invoke_agent second"),
        ("chat c", "third", "invoke_agent third"),
    ]
    assert {seen.parent(seen.one(f"invoke_agent {a.role}")) for a in pair} == {"invoke_agent crew"}


class Story(Flow[Any]):
    """A flow of a crew, an agent and a bare model call."""

    def __init__(self, server: ScriptedServer) -> None:
        super().__init__()
        self._server = server

    @start()
    def write(self) -> str:
        return str(crew(agent("writer", self._server), name="writers").kickoff())

    @listen(write)
    async def review(self, text: str) -> str:
        reviewed = await agent("critic", self._server).kickoff_async(text)
        return reviewed.raw

    @listen(review)
    def title(self, text: str) -> str:
        return str(model(self._server).call(text))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_flow_is_one_trace(server: ScriptedServer, asynchronous: bool) -> None:
    async def main() -> Any:
        return await Story(server).akickoff()

    assert (run(main) if asynchronous else Story(server).kickoff()) == "ok"
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [
        ("invoke_agent Story", None),
        ("invoke_agent writers", "invoke_agent Story"),
        ("invoke_agent writer", "invoke_agent writers"),
        ("chat m", "invoke_agent writer"),
        ("invoke_agent critic", "invoke_agent Story"),
        ("chat m", "invoke_agent critic"),
        ("chat m", "invoke_agent Story"),
    ]
    assert seen.llm[0].attributes[semconv.NODE_PATH] == "Story/writers/t0/writer"
    assert len({span.trace_id for span in seen.spans}) == 1


def test_a_streamed_flow_is_one_trace_too(server: ScriptedServer) -> None:
    flow = Story(server)
    flow.stream = True
    with flow.kickoff() as session:
        for _ in session:
            assert open_span() is None
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree()[0] == ("invoke_agent Story", None)
    assert len(seen.llm) == 3
    assert len({span.trace_id for span in seen.spans}) == 1


def test_an_agent_by_itself_is_a_run(server: ScriptedServer) -> None:
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    agent("calc", server, tools=[add]).kickoff("go")
    seen = Recorded(server)
    seen.assert_joined()
    assert [name for name, _ in seen.tree()] == [name for name, _ in ONE_CREW[1:]]
    assert seen.parent(seen.agents[0]) is None


def test_the_old_lite_agent_is_a_run_too(server: ScriptedServer) -> None:
    server.given(action("add", '{"a": 1, "b": 2}'), say("Thought: ok\nFinal Answer: three"))
    LiteAgent(role="calc", goal="g", backstory="b", llm=model(server), tools=[add]).kickoff("go")
    seen = Recorded(server)
    seen.assert_joined()
    assert [name for name, _ in seen.tree()] == [name for name, _ in ONE_CREW[1:]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_an_agent_is_recorded_as_a_bare_call(server: ScriptedServer, stream: bool) -> None:
    llm = model(server, stream=stream)
    assert llm.call("hi") == "ok"
    assert run(lambda: llm.acall([{"role": "user", "content": "hi"}])) == "ok"
    assert open_span() is None
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [("chat m", None), ("chat m", None)]
    assert [semconv.AGENT_NAME in span.attributes for span in seen.llm] == [False, False]
    assert [answered(span) for span in seen.llm] == [{"role": "assistant", "content": "ok"}] * 2


def test_functions_that_a_model_calls_by_itself_are_tool_calls(server: ScriptedServer) -> None:
    def plus(a: int, b: int) -> int:
        return a + b

    def broken(x: str) -> str:
        raise RuntimeError(f"tool broke {x}")

    llm, functions = model(server), {"plus": plus, "broken": broken}
    schema: Any = [{"type": "function", "function": {"name": "plus", "description": "d", "parameters": {}}}]
    for asked in (("plus", {"a": 1, "b": 2}), ("broken", {"x": "q"}), ("nope", {})):
        server.given(call(asked))
        llm.call("hi", tools=schema, available_functions=functions)
    seen = Recorded(server)
    seen.assert_joined()
    assert [(s.attributes[semconv.TOOL_NAME], s.attributes[semconv.TOOL_STATUS]) for s in seen.tools] == [
        ("plus", "ok"),
        ("broken", "raised"),
        ("nope", "unknown_tool"),
    ]
    assert seen.tools[1].status_message == "tool broke q"


def test_a_tool_call_of_a_plans_step_is_recorded(server: ScriptedServer) -> None:
    function = {"name": "boom", "arguments": '{"x": "q"}'}
    result = step_executor.execute_single_native_tool_call(
        {"id": "call_boom_0", "type": "function", "function": function},
        available_functions={"boom": boom.run},
        original_tools=[boom],
        structured_tools=None,
        tools_handler=None,
        agent=None,
        task=None,
        crew=None,
        event_source=None,
    )
    assert "tool broke q" in result.result
    (span,) = Recorded(server).tools
    assert span.attributes[semconv.TOOL_STATUS] == "raised"
    assert span.attributes[semconv.TOOL_CALL_ID] == "call_boom_0"
    assert span.attributes[semconv.TOOL_RESULT] == result.result


def test_two_rollouts_at_once_keep_apart(server: ScriptedServer) -> None:
    rewards: dict[str, list[Reward]] = {"a": [], "b": []}

    @tool("score")
    def score() -> str:
        """Gives a reward from inside."""
        emit_reward(0.5)
        return "scored"

    async def one(name: str, start: Callable[[Crew], Any]) -> None:
        server.given(call(("score", {})), model=name)
        made = crew(agent(f"{name}_1", server, name, tools=[score]), agent(f"{name}_2", server, name))
        active = ActiveRollout(name, f"{name}-1", server.openai_url, report_reward=rewards[name].append)
        with use_rollout(active):
            await start(made)

    async def main() -> None:
        await asyncio.gather(
            one("a", lambda made: made.akickoff()), one("b", lambda made: made.kickoff_async())
        )

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    assert len(seen.llm) == 6
    for span in seen.spans:
        assert span.attempt_id == f"{span.rollout_id}-1"
        if semconv.REQUEST_MODEL in span.attributes:
            assert span.attributes[semconv.REQUEST_MODEL] == span.rollout_id
            assert str(span.attributes[semconv.AGENT_NAME]).startswith(f"{span.rollout_id}_")
    assert [len({s.trace_id for s in seen.spans if s.rollout_id == name}) for name in "ab"] == [1, 1]
    assert [len(given) for given in rewards.values()] == [1, 1]


def test_crews_in_threads_keep_apart(server: ScriptedServer) -> None:
    def work(name: str) -> None:
        with use_rollout(ActiveRollout(name, f"{name}-1", server.openai_url)):
            crew(agent(name, server, name)).kickoff()

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


@pytest.mark.parametrize("way", [kickoff, akickoff])
@pytest.mark.parametrize("stream", [False, True])
def test_a_server_error_is_one_failed_call_and_the_runs_error(
    server: ScriptedServer, way: Callable[[Crew], None], stream: bool
) -> None:
    server.given(fail(500))
    with pytest.raises(Exception, match="scripted 500"):
        way(crew(agent("calc", server, llm=model(server, stream=stream))))
    seen = Recorded(server)
    assert [(span.name, span.status) for span in seen.spans] == [
        ("invoke_agent crew", SpanStatus.ERROR),
        ("invoke_agent calc", SpanStatus.ERROR),
        ("chat m", SpanStatus.ERROR),
    ]
    assert seen.llm[0].attributes[semconv.ERROR_TYPE] == "InternalServerError"
    assert semconv.OUTPUT_MESSAGES not in seen.llm[0].attributes
    assert seen.llm[0].span_id in server.requests[0].headers["traceparent"]


def test_what_crewai_tries_again_is_each_a_call_of_the_same_run(server: ScriptedServer) -> None:
    server.given(fail(500), say("second"))
    stubborn = Agent(role="calc", goal="g", backstory="b", llm=model(server), max_retry_limit=1)
    crew(stubborn).kickoff()
    seen = Recorded(server)
    seen.assert_joined(answered=1)
    assert [(s.name, s.status is SpanStatus.ERROR) for s in seen.spans] == [
        ("invoke_agent crew", False),
        ("invoke_agent calc", False),
        ("chat m", True),
        ("chat m", False),
    ]


def test_a_retried_request_is_one_call(server: ScriptedServer) -> None:
    server.given(fail(429), say("ok"))
    crew(agent("calc", server, llm=model(server, max_retries=2))).kickoff()
    seen = Recorded(server)
    seen.assert_joined(answered=1)
    assert len(server.requests) == 2
    assert len({request.headers["traceparent"] for request in server.requests}) == 1


async def cancelled(server: ScriptedServer, made: Crew) -> None:
    """The crew's run is cancelled while its request is at the server, which answers later."""
    task = asyncio.create_task(made.akickoff())
    assert await asyncio.to_thread(server.stalled.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_cancelled_crew_closes_its_spans(server: ScriptedServer) -> None:
    server.given(stall())

    async def main() -> Recorded:
        await cancelled(server, crew(agent("calc", server)))
        seen = Recorded(server)
        server.release.set()  # CrewAI asks in a thread, which goes on
        return seen

    at_once = run(main)
    assert [(span.name, span.attributes.get(semconv.ERROR_TYPE)) for span in at_once.spans] == [
        ("invoke_agent crew", "CancelledError"),
        ("invoke_agent calc", "CancelledError"),
        ("chat m", "CancelledError"),
    ]
    assert len(Recorded(server).spans) == 3


def test_what_a_cancelled_crew_still_does_stays_in_its_trace(server: ScriptedServer) -> None:
    delegated = {"task": "ask", "context": "c", "coworker": "helper"}
    server.given(call((DELEGATE, delegated)), say("outer says"), model="outer")
    late = call(("add", {"a": 1, "b": 2}))
    server.given(Reply(late.message, late.finish_reason, stall=True), say("inner says"), model="inner")

    async def main() -> None:
        made = managed(server)
        made.agents[0].tools = [add]
        await cancelled(server, made)
        server.release.set()

    run(main)
    seen = Recorded(server)
    assert len({span.trace_id for span in seen.spans}) == 1
    assert [(s.name, s.attributes.get(semconv.ERROR_TYPE)) for s in seen.spans] == [
        ("invoke_agent crew", "CancelledError"),
        ("invoke_agent boss", "CancelledError"),
        ("chat outer", None),
        (f"execute_tool {DELEGATE}", "CancelledError"),
        ("invoke_agent helper", "CancelledError"),
        ("chat inner", "CancelledError"),
        ("execute_tool add", None),
        ("chat inner", None),
    ]


def test_a_cancelled_kickoff_async_runs_on_and_is_recorded_to_the_end(server: ScriptedServer) -> None:
    late = call(("add", {"a": 1, "b": 2}))
    server.given(Reply(late.message, late.finish_reason, stall=True), say("three"))

    async def main() -> None:
        task = asyncio.create_task(crew(agent("calc", server, tools=[add])).kickoff_async())
        assert await asyncio.to_thread(server.stalled.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.release.set()

    run(main)
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == ONE_CREW
    assert not any(span.status is SpanStatus.ERROR for span in seen.spans)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_model_call_is_closed(server: ScriptedServer, stream: bool) -> None:
    server.given(stall())

    async def main() -> None:
        task = asyncio.create_task(model(server, stream=stream).acall("hi"))
        assert await asyncio.to_thread(server.stalled.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.release.set()

    run(main)
    (span,) = Recorded(server).llm
    assert span.attributes[semconv.ERROR_TYPE] == "CancelledError"


@pytest.mark.parametrize("stream", [False, True])
def test_a_structured_answer_is_recorded_as_it_was_said(server: ScriptedServer, stream: bool) -> None:
    server.given(say('{"a": 1}'))
    worker = agent("calc", server, llm=model(server, stream=stream))
    task = Task(description="d", expected_output="x", agent=worker, output_pydantic=Answer)
    output: Any = crew(worker, tasks=[task]).kickoff()
    assert output.pydantic == Answer(a=1)
    seen = Recorded(server)
    seen.assert_joined()
    assert [answered(span) for span in seen.llm] == [{"role": "assistant", "content": '{"a": 1}'}]


def test_every_request_of_a_structured_call_is_a_call(server: ScriptedServer) -> None:
    refused = say("")
    refused.message.update(refusal="I will not", content=None)
    server.given(refused, say('{"a": 1}'))  # nothing parsed: CrewAI asks again without the schema
    model(server).call("hi", response_model=Answer)
    seen = Recorded(server)
    seen.assert_joined(answered=2)
    assert answered(seen.llm[0])["refusal"] == "I will not"


class ResponsesServer(ScriptedServer):
    """Answers the same script in OpenAI's other API."""

    def _answer(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        message = request.reply.message
        output: list[Any] = [
            {
                "type": "function_call",
                "id": "fc",
                "call_id": asked["id"],
                "status": "completed",
                **asked["function"],
            }
            for asked in message.get("tool_calls", [])
        ]
        if message.get("content"):
            text = {"type": "output_text", "text": message["content"], "annotations": []}
            output.append(
                {
                    "type": "message",
                    "id": "msg",
                    "role": "assistant",
                    "status": "completed",
                    "content": [text],
                }
            )
        details: Any = {"cached_tokens": 0, "reasoning_tokens": 0}
        body = {
            "id": request.response_id,
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "model": request.body["model"],
            "output": output,
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "usage": {
                "input_tokens": 7,
                "output_tokens": 4,
                "total_tokens": 11,
                "input_tokens_details": details,
                "output_tokens_details": details,
            },
        }
        if not request.body.get("stream"):
            send(handler, 200, json.dumps(body).encode(), content_type="application/json")
            return
        events = [
            {"type": "response.output_item.done", "output_index": i, "sequence_number": i, "item": item}
            for i, item in enumerate(output)
        ]
        if message.get("content"):
            delta = {"output_index": 0, "content_index": 0, "item_id": "msg", "logprobs": []}
            events.append({"type": "response.output_text.delta", "delta": message["content"], **delta})
        events.append({"type": "response.completed", "sequence_number": len(events), "response": body})
        lines = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
        send(handler, 200, lines.encode(), content_type="text/event-stream")


@pytest.fixture
def responses_server() -> Iterator[ResponsesServer]:
    with ResponsesServer() as running:
        configure(running.url, tracer="light")
        yield running
        configure("")


def test_the_responses_api_is_recorded_as_chat(responses_server: ResponsesServer) -> None:
    server = responses_server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    llm = model(server, api="responses", temperature=0.5)
    assert str(crew(agent("calc", server, llm=llm, tools=[add])).kickoff()) == "three"
    seen = Recorded(server)
    assert seen.tree() == ONE_CREW
    first, second = seen.llm
    named = [request.headers["traceparent"].split("-")[2] for request in server.requests]
    assert named == [first.span_id, second.span_id]
    asked = server.requests[0].reply.message["tool_calls"]
    assert answered(first)["tool_calls"] == asked
    assert answered(second) == {"role": "assistant", "content": "three"}
    system, user, *rest = sent(second)
    assert [system["role"], user["role"]] == ["system", "user"]
    result = {"role": "tool", "tool_call_id": asked[0]["id"], "content": "3"}
    assert rest == [{"role": "assistant", "tool_calls": asked}, result]
    expected = {
        semconv.REQUEST_TEMPERATURE: 0.5,
        semconv.RESPONSE_ID: server.requests[0].response_id,
        semconv.RESPONSE_FINISH_REASONS: ["tool_calls"],
        semconv.USAGE_INPUT: 7,
        semconv.USAGE_OUTPUT: 4,
    }
    assert {key: first.attributes.get(key) for key in expected} == expected


def test_a_streamed_response_is_recorded_as_chat(responses_server: ResponsesServer) -> None:
    server = responses_server.given(say("three"))
    assert model(server, api="responses", stream=True).call("hi") == "three"
    (span,) = Recorded(server).llm
    assert sent(span) == [{"role": "user", "content": "hi"}]
    assert answered(span) == {"role": "assistant", "content": "three"}
    assert span.attributes[semconv.RESPONSE_ID] == server.requests[0].response_id
    assert span.attributes[semconv.USAGE_OUTPUT] == 4


def test_a_crew_that_was_given_no_rollout_opens_a_live_one(server: ScriptedServer) -> None:
    listener = LightningEventListener()
    assert listener.rollout_id is None
    made = crew(agent("calc", server))
    made.kickoff()
    first = listener.rollout_id
    made.kickoff()
    seen = Recorded(server)
    roots = [span for span in seen.spans if span.parent_id is None]
    assert [live_rollout_id(span.trace_id) for span in roots] == [first, listener.rollout_id]
    assert first != listener.rollout_id
    with trace("several") as several:
        made.kickoff()
        model(server).call("hi")
    assert listener.rollout_id == several.rollout_id
    with use_rollout(ActiveRollout("given", "given-1", server.openai_url)):
        made.kickoff()
    assert listener.rollout_id == "given"


def test_without_a_server_nothing_is_recorded_and_the_crew_works(server: ScriptedServer) -> None:
    configure("")
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    assert str(crew(agent("calc", server, tools=[add])).kickoff()) == "three"
    assert "traceparent" not in server.requests[0].headers
    assert server.spans == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_hook_that_fails_does_not_reach_the_crew(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("bug in the adapter")

    for where in ("llm.start_llm", "tools.start_tool", "runs.start_agent"):
        monkeypatch.setattr(f"agentlightning_crewai.{where}", broken)
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    before = failures.total()
    made = crew(agent("calc", server, llm=model(server, stream=stream), tools=[add]))
    assert str(made.kickoff()) == "three"
    assert failures.total() >= before + 5  # two runs, two model calls, one tool call


@pytest.mark.parametrize("stream", [False, True])
def test_a_recorder_that_fails_at_the_end_does_not_reach_the_crew(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("bug in the adapter")

    monkeypatch.setattr("agentlightning_crewai.llm.end_llm", broken)
    monkeypatch.setattr("agentlightning_crewai.tools.end_tool", broken)
    monkeypatch.setattr("agentlightning_crewai.wire._ChatParts._add_call", broken)
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    made = crew(agent("calc", server, llm=model(server, stream=stream), tools=[add]))
    assert str(made.kickoff()) == "three"


def test_instrumenting_twice_records_once_and_undoing_it_records_nothing(server: ScriptedServer) -> None:
    ours = OpenAICompletion._call_completions
    agentlightning_crewai.instrument()
    made = crew(agent("calc", server))
    made.kickoff()
    assert len(Recorded(server).llm) == 1
    agentlightning_crewai.uninstrument()
    assert OpenAICompletion._call_completions is not ours
    made.kickoff()
    assert len(Recorded(server).llm) == 1
    assert "traceparent" not in server.requests[1].headers
    agentlightning_crewai.instrument()
    made.kickoff()  # its model was made, and used, before
    assert len(Recorded(server).llm) == 2


def test_uninstrumenting_gives_the_originals_back() -> None:
    agentlightning_crewai.uninstrument()
    owners = (Crew, Agent, Flow, LiteAgent, OpenAICompletion, _base_client.SyncAPIClient)
    before = [dict(vars(owner)) for owner in owners]
    agentlightning_crewai.instrument()
    assert [dict(vars(owner)) for owner in owners] != before
    agentlightning_crewai.uninstrument()
    assert [dict(vars(owner)) for owner in owners] == before


def test_what_is_sent_is_recorded_though_crewai_changes_the_schema(server: ScriptedServer) -> None:
    server.given(say("fine"))
    crew(agent("calc", server, tools=[add])).kickoff()
    (span,) = Recorded(server).llm
    (schema,) = json.loads(str(span.attributes[semconv.TOOL_DEFINITIONS]))
    assert schema["function"]["parameters"]["properties"]["a"]["type"] == "integer"
    assert sent(span) == server.requests[0].body["messages"]


def test_both_tracers_record_the_same() -> None:
    def shape(tracer: str) -> list[Span]:
        with recording(tracer) as server:
            server.given(call(("add", {"a": 1, "b": 2})), say("three"))
            crew(agent("calc", server, tools=[add])).kickoff()
            return without_ids_and_times(Recorded(server).spans)

    assert shape("light") == shape("otel")


AGENT_SCRIPT = """
import sys
from crewai import LLM, Agent, Crew, Task
llm = LLM(model="m", provider="openai", base_url=sys.argv[1], api_key="k")
agent = Agent(role="unmodified", goal="g", backstory="b", llm=llm)
Crew(agents=[agent], tasks=[Task(description="go", expected_output="x", agent=agent)]).kickoff()
"""


def test_opentelemetry_instrument_records_an_unmodified_script(tmp_path: Path) -> None:
    (script := tmp_path / "crew.py").write_text(AGENT_SCRIPT)
    command = os.path.join(os.path.dirname(sys.executable), "opentelemetry-instrument")
    with ScriptedServer() as server:
        done = subprocess.run(
            [command, sys.executable, str(script), server.openai_url],
            env={**os.environ, "HOME": str(tmp_path), ENV_URL: server.url, ENV_TRACER: "otel"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        names = sorted(span.name for span in server.spans)
    assert names == ["chat m", "invoke_agent crew", "invoke_agent unmodified"]
