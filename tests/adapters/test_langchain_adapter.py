# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import asyncio
import copy
import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import get_usage_metadata_callback
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, chain
from langchain_core.tools import BaseTool, InjectedToolCallId, tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send, interrupt
from pydantic import BaseModel
from tests.adapters.recorded import Recorded, answered, recording
from tests.adapters.scripted_server import ScriptedServer, call, fail, say, stall
from tests.core.span_receiver import without_ids_and_times

import agentlightning_langchain
from agentlightning import openai_sdk, semconv
from agentlightning.context import (
    ENV_TRACER,
    ENV_URL,
    ActiveRollout,
    open_span,
    set_process_rollout,
    use_rollout,
)
from agentlightning.rewards import emit_reward
from agentlightning.tracing import configure, trace
from agentlightning.tracing.guard import failures
from agentlightning.types import Reward, Span, SpanStatus, live_rollout_id
from agentlightning_langchain import LightningCallbackHandler, handler, recorder

GO: Any = {"messages": [("user", "go")]}


class Answer(BaseModel):
    a: int


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def boom(x: str) -> str:
    """Always fails."""
    raise RuntimeError(f"tool broke {x}")


@tool
def validates(x: str) -> str:
    """Fails with the library's error of its own schema, from the inside."""
    return str(Answer.model_validate({"a": x}))


@tool
def delegates(x: str) -> str:
    """Calls another tool with arguments that do not fit."""
    return str(add.invoke({"a": x}))


@tool
def soft(x: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> ToolMessage:
    """Reports its failure instead of raising it."""
    return ToolMessage(f"no {x}", tool_call_id=tool_call_id, status="error")


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    before = failures.total()
    yield
    agentlightning_langchain.uninstrument()
    assert handler._recorder.runs == {}  # pyright: ignore[reportPrivateUsage]
    assert open_span() is None
    assert failures.total() == before


def model(server: ScriptedServer, name: str = "m", **settings: Any) -> ChatOpenAI:
    given: dict[str, Any] = {"api_key": "k", "max_retries": 0, **settings}
    return ChatOpenAI(model=name, base_url=server.openai_url, **given)


def config(*handlers: LightningCallbackHandler) -> Any:
    return {"callbacks": list(handlers or (LightningCallbackHandler(),))}


def graph(nodes: dict[str, Any], *edges: tuple[str, str], **settings: Any) -> Any:
    """A compiled graph of nodes that run one after the other, or along the edges that are given."""
    building: Any = StateGraph(MessagesState)
    for name, node in nodes.items():
        building.add_node(name, node)
    names = [START, *nodes]
    for edge in edges or itertools.pairwise(names):
        building.add_edge(*edge)
    return building.compile(**settings)


def asks(chat: Any) -> Callable[[Any], Any]:
    """A node that asks the model."""
    return lambda state: {"messages": [chat.invoke(state["messages"])]}


def asked(question: str) -> Any:
    return {"messages": [("user", question)]}


def agent_names(spans: list[Span]) -> list[Any]:
    return [span.attributes.get(semconv.AGENT_NAME) for span in spans]


def node_paths(spans: list[Span]) -> list[Any]:
    return [span.attributes.get(semconv.NODE_PATH) for span in spans]


# --- what is recorded ----------------------------------------------------------------------------


def test_an_agent_is_recorded_call_by_call(server: ScriptedServer) -> None:
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    chat = model(server, temperature=0.5, max_completion_tokens=9, seed=3, stop=["END"])
    create_agent(chat, [add], name="calc", system_prompt="sys").invoke(GO, config=config())
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [
        ("invoke_agent calc", None),
        ("chat m", "invoke_agent calc"),
        ("execute_tool add", "invoke_agent calc"),
        ("chat m", "invoke_agent calc"),
    ]
    assert agent_names(seen.spans) == ["calc"] * 4
    assert node_paths(seen.spans) == [None, "model", "tools", "model"]
    first, second = seen.llm
    sent_calls: Any = answered(first)["tool_calls"]
    assert [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in sent_calls] == [
        (server.requests[0].reply.message["tool_calls"][0]["id"], "add", {"a": 1, "b": 2})
    ]
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
    (span,) = seen.tools
    assert (span.attributes[semconv.TOOL_ARGUMENTS], span.attributes[semconv.TOOL_RESULT]) == (
        '{"a":1,"b":2}',
        "3",
    )
    assert span.attributes[semconv.TOOL_DESCRIPTION] == "Add two numbers."
    assert first.end_ns <= span.start_ns <= span.end_ns <= second.start_ns


def run_invoke(agent: Any, given: Any) -> None:
    agent.invoke(GO, config=given)


def run_ainvoke(agent: Any, given: Any) -> None:
    asyncio.run(agent.ainvoke(GO, config=given))


def run_stream(agent: Any, given: Any) -> None:
    assert list(agent.stream(GO, config=given, stream_mode="messages"))


def run_astream(agent: Any, given: Any) -> None:
    async def main() -> None:
        async for _ in agent.astream(GO, config=given, stream_mode=["messages", "updates"]):
            pass

    asyncio.run(main())


def run_astream_events(agent: Any, given: Any) -> None:
    async def main() -> None:
        async for _ in agent.astream_events(GO, config=given, version="v2"):
            pass

    asyncio.run(main())


def run_thread(agent: Any, given: Any) -> None:
    thread = threading.Thread(target=run_invoke, args=(agent, given))
    thread.start()
    thread.join()


EVERY_WAY = [run_invoke, run_ainvoke, run_stream, run_astream, run_astream_events, run_thread]


@pytest.mark.parametrize("run", EVERY_WAY)
def test_every_way_to_run_an_agent_gives_the_same_calls(server: ScriptedServer, run: Any) -> None:
    server.given(call(("add", {"a": 1, "b": 2}), ("nope", {})), say("three"))
    run(create_agent(model(server), [add], name="calc"), config())
    seen = Recorded(server)
    seen.assert_joined()
    assert agent_names(seen.llm) == ["calc", "calc"]
    assert seen.tool_statuses() == {"add_0": "ok", "nope_1": "unknown_tool"}
    assert {seen.parent(span) for span in seen.llm + seen.tools} == {"invoke_agent calc"}
    streamed = any(request.body.get("stream") for request in server.requests)
    assert [span.attributes.get(semconv.REQUEST_STREAM) for span in seen.llm] == [streamed or None] * 2


def test_every_way_a_tool_call_ends_is_told_apart(server: ScriptedServer) -> None:
    server.given(
        call(
            ("add", {"a": 1, "b": 2}),
            ("boom", {"x": "q"}),
            ("nope", {}),
            ("add", {"a": "z"}),
            ("validates", {"x": "z"}),
            ("soft", {"x": "luck"}),
            ("delegates", {"x": "z"}),
        ),
        say("done"),
    )
    chat = model(server)
    tools: list[BaseTool] = [add, boom, validates, soft, delegates]
    flow = graph(
        {
            "model": asks(chat.bind_tools(tools)),
            "tools": ToolNode(tools, handle_tool_errors=True),
            "last": asks(chat),
        }
    )
    flow.invoke(GO, config=config())
    seen = Recorded(server)
    (inner,) = [span for span in seen.tools if semconv.TOOL_CALL_ID not in span.attributes]
    assert (seen.parent(inner), inner.attributes[semconv.TOOL_STATUS]) == (
        "execute_tool delegates",
        "bad_arguments",
    )
    assert seen.tool_statuses() == {
        "add_0": "ok",
        "boom_1": "raised",
        "nope_2": "unknown_tool",
        "add_3": "bad_arguments",
        "validates_4": "raised",
        "soft_5": "raised",
        "delegates_6": "raised",
    }
    broken = seen.one("execute_tool boom")
    assert (broken.status, broken.status_message) == (SpanStatus.ERROR, "tool broke q")
    assert broken.attributes[semconv.ERROR_TYPE] == "RuntimeError"
    assert seen.one("execute_tool nope").attributes[semconv.TOOL_ARGUMENTS] == "{}"
    assert seen.one("execute_tool soft").status_message == "no luck"


def test_arguments_that_do_not_parse_are_a_bad_call(server: ScriptedServer) -> None:
    server.given(call(("add", "{not json")))
    create_agent(model(server), [add], name="calc").invoke(GO, config=config())
    seen = Recorded(server)
    (span,) = seen.tools
    assert span.attributes[semconv.TOOL_STATUS] == "bad_arguments"
    assert span.attributes[semconv.TOOL_ARGUMENTS] == "{not json"
    assert seen.parent(span) == "invoke_agent calc"
    assert answered(seen.llm[0])["tool_calls"][0]["function"]["arguments"] == "{not json"


def test_an_unknown_tool_at_the_end_of_a_run_is_not_missed(server: ScriptedServer) -> None:
    server.given(call(("nope", {})))
    chat = model(server).bind_tools([add])
    graph({"model": asks(chat), "tools": ToolNode([add])}).invoke(GO, config=config())
    assert Recorded(server).tool_statuses() == {"nope_0": "unknown_tool"}


def test_a_tool_that_kills_the_run_is_recorded_and_so_is_the_run(server: ScriptedServer) -> None:
    server.given(call(("boom", {"x": "q"})))
    with pytest.raises(RuntimeError, match="tool broke"):
        create_agent(model(server), [boom], name="calc").invoke(GO, config=config())
    seen = Recorded(server)
    assert seen.tool_statuses() == {"boom_0": "raised"}
    assert (seen.agents[0].status, seen.agents[0].status_message) == (SpanStatus.ERROR, "tool broke q")


def test_tools_that_the_users_own_loop_runs_are_read_from_the_messages(server: ScriptedServer) -> None:
    server.given(call(("add", {"a": 1, "b": 2}), ("boom", {"x": "q"})), say("three"))
    chat = model(server).bind_tools([add, boom])

    @chain
    def own_loop(question: str) -> Any:
        messages: list[Any] = [HumanMessage(question), chat.invoke(question)]
        first, second = messages[-1].tool_calls
        messages.append(ToolMessage("3", tool_call_id=first["id"]))
        messages.append(ToolMessage("it broke", tool_call_id=second["id"], status="error"))
        return chat.invoke(messages)

    own_loop.invoke("go", config=config())
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tool_statuses() == {"add_0": "ok", "boom_1": "raised"}
    assert [span.attributes[semconv.TOOL_ARGUMENTS] for span in seen.tools] == ['{"a":1,"b":2}', '{"x":"q"}']


def test_structured_output_is_one_joined_call(server: ScriptedServer) -> None:
    for method in ("json_schema", "function_calling", "json_mode"):
        reply = call(("Answer", {"a": 1})) if method == "function_calling" else say('{"a": 1}')
        server.given(reply)
        chat: Any = model(server).with_structured_output(Answer, method=method)
        assert chat.invoke("give json", config=config()) == Answer(a=1)
    seen = Recorded(server)
    seen.assert_joined()
    assert len(seen.llm) == 3
    assert answered(seen.llm[0])["content"] == '{"a": 1}'


def test_a_chain_without_an_agent_is_one_trace(server: ScriptedServer) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "sys"), ("user", "{x}")])
    pipeline: Any = prompt | model(server) | StrOutputParser()
    assert pipeline.with_config(run_name="planner").invoke({"x": "q"}, config=config()) == "ok"
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [("invoke_agent planner", None), ("chat m", "invoke_agent planner")]
    assert agent_names(seen.llm) == ["planner"]


def test_a_bare_call_is_a_trace_of_its_own(server: ScriptedServer) -> None:
    model(server).invoke("q", config=config())
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [("chat m", None)]


# --- names and places ----------------------------------------------------------------------------


def test_agents_in_a_graph_have_their_names_and_places(server: ScriptedServer) -> None:
    helper = create_agent(model(server, "helper"), [], name="helper")
    unnamed = create_agent(model(server, "unnamed"), [])

    def writer(state: Any) -> Any:
        return {"messages": helper.invoke({"messages": state["messages"]})["messages"][-1:]}

    flow = graph(
        {
            "writer": writer,
            "critic": asks(model(server, "critic")),
            "as_node": helper,
            "nameless": unnamed,
            "inner": graph({"leaf": asks(model(server, "leaf"))}, name="sub"),
        },
        name="flow",
    )
    flow.invoke(GO, config=config())
    seen = Recorded(server)
    seen.assert_joined()
    told = [
        (
            s.attributes[semconv.REQUEST_MODEL],
            s.attributes[semconv.AGENT_NAME],
            s.attributes[semconv.NODE_PATH],
        )
        for s in seen.llm
    ]
    assert told == [
        ("helper", "helper", "writer/model"),
        ("critic", "critic", "critic"),
        ("helper", "helper", "as_node/model"),
        ("unnamed", "nameless", "nameless/model"),
        ("leaf", "leaf", "inner/leaf"),
    ]
    assert [seen.parent(span) for span in seen.llm] == [
        "invoke_agent helper",
        "invoke_agent flow",
        "invoke_agent helper",
        "invoke_agent nameless",
        "invoke_agent sub",
    ]
    assert {seen.parent(span) for span in seen.agents} == {None, "invoke_agent flow"}


def test_an_agent_as_a_tool_nests_under_the_tool_call(server: ScriptedServer) -> None:
    server.given(call(("ask_helper", {"q": "x"})), say("fin"), model="outer")
    helper = create_agent(model(server, "inner"), [], name="helper")

    @tool
    def ask_helper(q: str) -> str:
        """Ask the helper."""
        return str(helper.invoke(asked(q))["messages"][-1].content)

    create_agent(model(server, "outer"), [ask_helper], name="boss").invoke(GO, config=config())
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [
        ("invoke_agent boss", None),
        ("chat outer", "invoke_agent boss"),
        ("execute_tool ask_helper", "invoke_agent boss"),
        ("invoke_agent helper", "execute_tool ask_helper"),
        ("chat inner", "invoke_agent helper"),
        ("chat outer", "invoke_agent boss"),
    ]
    assert agent_names(seen.llm) == ["boss", "helper", "boss"]


def test_an_agent_in_a_tool_that_drops_the_config_still_nests(server: ScriptedServer) -> None:
    server.given(call(("ask_helper", {"q": "x"})), say("fin"), model="outer")
    helper = create_agent(model(server, "inner"), [], name="helper")

    @tool
    def ask_helper(q: str) -> str:
        """Ask the helper, with callbacks of its own instead of the caller's."""
        found = helper.invoke(asked(q), config=config())
        return str(found["messages"][-1].content)

    create_agent(model(server, "outer"), [ask_helper], name="boss").invoke(GO, config=config())
    seen = Recorded(server)
    assert seen.parent(seen.one("invoke_agent helper")) == "execute_tool ask_helper"


def test_fan_out_nodes_and_sends_keep_their_parents(server: ScriptedServer) -> None:
    chat = model(server)
    building: Any = StateGraph(MessagesState)
    for name in ("left", "right", "mapped"):
        building.add_node(name, asks(chat))
    building.add_edge(START, "left")
    building.add_edge(START, "right")

    def sends(state: Any) -> list[Send]:
        return [Send("mapped", state) for _ in range(3)]

    building.add_conditional_edges("left", sends)
    building.compile(name="flow").invoke(GO, config=config())
    seen = Recorded(server)
    seen.assert_joined()
    assert sorted(agent_names(seen.llm)) == ["left", "mapped", "mapped", "mapped", "right"]
    assert {seen.parent(span) for span in seen.llm} == {"invoke_agent flow"}


# --- concurrency ---------------------------------------------------------------------------------


def test_two_rollouts_at_once_keep_apart(server: ScriptedServer) -> None:
    rewards: dict[str, list[Reward]] = {"a": [], "b": []}

    @tool
    def score() -> str:
        """A sync tool, which LangGraph runs in a thread."""
        emit_reward(0.5)
        return "scored"

    async def one(name: str, given: Any) -> None:
        server.given(call(("score", {}), ("score", {})), say("done"), model=name)
        active = ActiveRollout(name, f"{name}-1", server.openai_url, report_reward=rewards[name].append)
        with use_rollout(active):
            await create_agent(model(server, name), [score], name=name).ainvoke(GO, config=given)

    async def main() -> None:
        given = config()
        await asyncio.gather(one("a", given), one("b", given))

    asyncio.run(main())
    seen = Recorded(server)
    seen.assert_joined()
    assert len(seen.llm) == 4
    for span in seen.spans:
        assert span.attempt_id == f"{span.rollout_id}-1"
        assert span.attributes[semconv.AGENT_NAME] == span.rollout_id
    assert [len(given) for given in rewards.values()] == [2, 2]


def test_batches_and_gathered_calls_each_have_their_span(server: ScriptedServer) -> None:
    chat = model(server)
    chat.batch(["a", "b", "c"], config=config())

    async def main() -> None:
        given = config()
        await asyncio.gather(chat.ainvoke("d", config=given), chat.abatch(["e", "f"], config=given))
        async for _ in chat.astream("g", config=given):
            pass

    asyncio.run(main())
    seen = Recorded(server)
    seen.assert_joined()
    assert len({span.trace_id for span in seen.llm}) == 7


def test_several_prompts_in_one_generate_are_not_mixed_up(server: ScriptedServer) -> None:
    prompts: Any = [[HumanMessage("a")], [HumanMessage("b")]]
    model(server).generate(prompts, callbacks=[LightningCallbackHandler()])
    seen = Recorded(server)
    assert len(seen.llm) == 2
    assert sorted(str(s.attributes[semconv.RESPONSE_ID]) for s in seen.llm) == sorted(
        request.response_id for request in server.requests
    )
    # LangChain announces both before it sends either: no header rather than a wrong one.
    assert all("traceparent" not in request.headers for request in server.requests)


def test_a_thread_that_the_user_starts_belongs_to_the_process_rollout(server: ScriptedServer) -> None:
    agentlightning_langchain.instrument()

    def node(state: Any) -> Any:
        thread = threading.Thread(target=lambda: model(server).invoke("from a thread"))
        thread.start()
        thread.join()
        return {"messages": []}

    set_process_rollout(ActiveRollout("p", "p-1", server.openai_url))
    try:
        graph({"node": node}).invoke(GO)
    finally:
        set_process_rollout(None)
    seen = Recorded(server)
    seen.assert_joined()
    assert [(span.rollout_id, span.parent_id) for span in seen.llm] == [("p", None)]


def test_two_streams_read_in_turn_stay_two_traces(server: ScriptedServer) -> None:
    first, second = (
        graph({"node": asks(model(server, name))}, name=name).stream(GO, config=config()) for name in "ab"
    )
    for _ in zip(first, second, strict=False):
        pass
    list(first), list(second)  # pyright: ignore[reportUnusedExpression]
    seen = Recorded(server)
    seen.assert_joined()
    assert sorted(seen.tree(), key=str) == [
        ("chat a", "invoke_agent a"),
        ("chat b", "invoke_agent b"),
        ("invoke_agent a", None),
        ("invoke_agent b", None),
    ]


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [run_invoke, run_ainvoke, run_stream, run_astream])
def test_a_server_error_is_the_calls_and_the_agents_error(server: ScriptedServer, run: Any) -> None:
    server.given(fail(500))
    with pytest.raises(Exception, match="scripted 500"):
        run(create_agent(model(server), [], name="calc"), config())
    seen = Recorded(server)
    assert [(span.name, span.status) for span in seen.spans] == [
        ("invoke_agent calc", SpanStatus.ERROR),
        ("chat m", SpanStatus.ERROR),
    ]
    assert semconv.OUTPUT_MESSAGES not in seen.llm[0].attributes
    assert seen.llm[0].span_id in server.requests[0].headers["traceparent"]


def test_a_request_that_the_sdk_retries_is_one_call(server: ScriptedServer) -> None:
    server.given(fail(429), say("ok"))
    model(server, max_retries=2).invoke("q", config=config())
    seen = Recorded(server)
    seen.assert_joined(answered=1)
    assert len({request.headers["traceparent"] for request in server.requests}) == 1


def test_retries_and_fallbacks_of_langchain_are_calls_of_their_own(server: ScriptedServer) -> None:
    server.given(fail(500), fail(500), say("ok"), model="a").given(fail(500), model="b")
    model(server, "a").with_retry(stop_after_attempt=3, wait_exponential_jitter=False).invoke(
        "q", config=config()
    )
    model(server, "b").with_fallbacks([model(server, "c")]).invoke("q", config=config())
    seen = Recorded(server)
    assert [(span.name, span.status) for span in seen.llm] == [
        ("chat a", SpanStatus.ERROR),
        ("chat a", SpanStatus.ERROR),
        ("chat a", SpanStatus.UNSET),
        ("chat b", SpanStatus.ERROR),
        ("chat c", SpanStatus.UNSET),
    ]
    seen.assert_joined(answered=2)


@pytest.mark.parametrize("inside", ["agent", "bare", "waited"])
def test_a_cancelled_call_is_closed(server: ScriptedServer, inside: str) -> None:
    server.given(stall())
    chat = model(server)

    async def waits(state: Any) -> Any:
        try:
            await asyncio.wait_for(chat.ainvoke("q"), 0.2)
        except TimeoutError:
            return {"messages": []}
        raise AssertionError("the call was answered")

    async def main() -> None:
        if inside == "waited":
            await graph({"node": waits}, name="calc").ainvoke(GO, config=config())
            server.release.set()
            return
        runnable: Any = chat if inside == "bare" else create_agent(chat, [], name="calc")
        task = asyncio.create_task(runnable.ainvoke("q" if inside == "bare" else GO, config=config()))
        assert await asyncio.to_thread(server.stalled.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.release.set()

    asyncio.run(main())
    seen = Recorded(server)
    (span,) = seen.llm
    assert (span.status, span.attributes[semconv.ERROR_TYPE]) == (SpanStatus.ERROR, "CancelledError")
    assert span.span_id in server.requests[0].headers["traceparent"]
    expected = {"bare": [], "agent": [SpanStatus.ERROR], "waited": [SpanStatus.UNSET]}[inside]
    assert [agent.status for agent in seen.agents] == expected


def test_a_stream_that_its_reader_leaves_early_is_closed(server: ScriptedServer) -> None:
    server.given(say("a long answer"))
    stream = model(server).stream("q", config=config())
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    (span,) = Recorded(server).llm
    assert span.attributes[semconv.ERROR_TYPE] == "GeneratorExit"


def test_an_interrupt_is_not_an_error_and_the_resumed_run_goes_on(server: ScriptedServer) -> None:
    server.given(call(("confirm", {})), say("done"))

    @tool
    def confirm() -> str:
        """Ask a person."""
        return str(interrupt("really?"))

    agent = create_agent(model(server), [confirm], name="calc", checkpointer=InMemorySaver())
    given: Any = {**config(), "configurable": {"thread_id": "1"}}
    agent.invoke(GO, config=given)
    agent.invoke(Command(resume="yes"), config=given)
    seen = Recorded(server)
    seen.assert_joined()
    assert [span.status for span in seen.spans] == [SpanStatus.UNSET] * len(seen.spans)
    interrupted, resumed = seen.tools
    assert [event.name for event in interrupted.events] == ["interrupted"]
    assert (resumed.attributes[semconv.TOOL_STATUS], resumed.attributes[semconv.TOOL_RESULT]) == ("ok", "yes")


def test_runs_whose_end_never_comes_do_not_pile_up(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MAX_RUNS", 3)
    handler_ = LightningCallbackHandler()
    ids = [uuid4() for _ in range(5)]
    for run_id in ids:
        handler_.on_llm_start({}, ["q"], run_id=run_id)
    assert len(handler._recorder.runs) == 3  # pyright: ignore[reportPrivateUsage]
    for run_id in ids:
        handler_.on_llm_error(RuntimeError("late"), run_id=run_id)
    seen = Recorded(server)
    assert [span.status_message for span in seen.llm] == ["LangChain reported no end of this run"] * 2 + [
        "late"
    ] * 3


def test_a_failed_tool_without_an_id_is_not_recorded_twice(server: ScriptedServer) -> None:
    """LangChain 0.3 tells a tool's call id only with its result, so not when it fails."""
    hooks = LightningCallbackHandler()
    root, failing, asking = uuid4(), uuid4(), uuid4()
    asked_for = AIMessage("", tool_calls=[{"name": "boom", "args": {"x": "q"}, "id": "c1"}])
    history: list[BaseMessage] = [
        asked_for,
        ToolMessage("it broke", tool_call_id="c1", name="boom", status="error"),
    ]
    hooks.on_chain_start({}, {}, run_id=root, name="calc")
    hooks.on_tool_start({"name": "boom"}, "{}", run_id=failing, parent_run_id=root)
    hooks.on_tool_error(RuntimeError("it broke"), run_id=failing)
    hooks.on_chat_model_start({}, [history], run_id=asking, parent_run_id=root)
    hooks.on_llm_end(LLMResult(generations=[[]]), run_id=asking)
    hooks.on_chain_end({}, run_id=root)
    assert [span.attributes[semconv.TOOL_STATUS] for span in Recorded(server).tools] == ["raised"]


# --- the handler ---------------------------------------------------------------------------------


def test_the_handler_names_the_live_rollout_of_its_last_run(server: ScriptedServer) -> None:
    given = LightningCallbackHandler()
    assert given.rollout_id is None
    agent = create_agent(model(server), [], name="calc")
    agent.invoke(GO, config=config(given))
    (root,) = Recorded(server).agents
    assert given.rollout_id == live_rollout_id(root.trace_id)
    with use_rollout(ActiveRollout("r", "r-1")):
        agent.invoke(GO, config=config(given))
    assert given.rollout_id == "r"


def test_a_reward_inside_a_live_run_is_part_of_its_trace(server: ScriptedServer) -> None:
    @chain
    def scored(question: str) -> str:
        model(server).invoke(question)
        emit_reward(1.0)
        return "ok"

    scored.invoke("q", config=config())
    seen = Recorded(server)
    assert seen.parent(seen.one("reward reward")) == "invoke_agent scored"


def test_a_trace_of_the_users_own_holds_several_runs(server: ScriptedServer) -> None:
    with trace("task") as task:
        model(server).invoke("a", config=config())
        create_agent(model(server), [], name="calc").invoke(GO, config=config())
        emit_reward(1.0)
    seen = Recorded(server)
    assert {span.trace_id for span in seen.spans} == {task.trace_id}
    assert [seen.parent(span) for span in seen.spans] == [None, "task", "task", "invoke_agent calc", "task"]


def test_instrumenting_once_records_everything_everywhere(server: ScriptedServer) -> None:
    first = agentlightning_langchain.instrument()
    assert agentlightning_langchain.instrument() is first
    agent = create_agent(model(server), [], name="calc")
    agent.invoke(GO)
    run_thread(agent, None)
    agent.invoke(GO, config=config())  # a handler of one's own beside it adds nothing
    seen = Recorded(server)
    seen.assert_joined()
    assert len(seen.llm) == 3
    agentlightning_langchain.uninstrument()
    agent.invoke(GO)
    assert len(Recorded(server).llm) == 3


def test_two_handlers_on_one_run_record_it_once(server: ScriptedServer) -> None:
    chat = model(server, callbacks=[LightningCallbackHandler()])
    create_agent(chat, [], name="calc").invoke(GO, config=config(LightningCallbackHandler()))
    seen = Recorded(server)
    seen.assert_joined()
    assert len(seen.spans) == 2


def test_a_handler_on_the_model_alone_sees_who_asks(server: ScriptedServer) -> None:
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))
    chat = model(server, callbacks=[LightningCallbackHandler()])
    create_agent(chat, [add], name="calc").invoke(GO)
    seen = Recorded(server)
    seen.assert_joined()
    assert agent_names(seen.llm) == ["calc", "calc"]
    assert node_paths(seen.llm) == ["model", "model"]


def test_copies_of_a_handler_are_the_handler() -> None:
    given = LightningCallbackHandler()
    assert copy.copy(given) is given
    assert copy.deepcopy([given])[0] is given


def test_other_handlers_are_not_disturbed(server: ScriptedServer) -> None:
    agentlightning_langchain.instrument()
    with get_usage_metadata_callback() as usage:
        model(server).invoke("q")
    assert usage.usage_metadata["m"]["output_tokens"] == 4
    assert len(Recorded(server).llm) == 1


def test_without_a_server_nothing_is_recorded_and_the_agent_works(server: ScriptedServer) -> None:
    configure("")
    given = LightningCallbackHandler()
    create_agent(model(server), [], name="calc").invoke(GO, config=config(given))
    assert given.rollout_id is None
    assert "traceparent" not in server.requests[0].headers
    assert server.spans == []


def test_the_sdk_patch_goes_with_the_last_adapter_that_needs_it(server: ScriptedServer) -> None:
    model(server).invoke("q", config=config())
    assert "traceparent" in server.requests[0].headers
    agentlightning_langchain.uninstrument()
    assert not openai_sdk._patches  # pyright: ignore[reportPrivateUsage]


def test_both_tracers_record_the_same() -> None:
    def shape(tracer: str) -> list[Span]:
        with recording(tracer) as server:
            server.given(call(("add", {"a": 1, "b": 2}), ("nope", {})), say("three"))
            create_agent(model(server), [add], name="calc").invoke(GO, config=config())
            return without_ids_and_times(Recorded(server).spans)

    assert shape("light") == shape("otel")


def test_a_lambda_that_calls_the_sdk_itself_is_placed_in_its_run(server: ScriptedServer) -> None:
    from openai import OpenAI

    def direct(question: str) -> str:
        with OpenAI(base_url=server.openai_url, api_key="k") as sdk:
            sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": question}])
        return "ok"

    (RunnableLambda(lambda x: x) | RunnableLambda(direct)).invoke("q", config=config())
    (root,) = Recorded(server).agents
    assert server.requests[0].headers["traceparent"] == f"00-{root.trace_id}-{root.span_id}-01"


AGENT_SCRIPT = """
import sys
from langchain_openai import ChatOpenAI
from langchain.agents import create_agent
chat = ChatOpenAI(model="m", base_url=sys.argv[1], api_key="k")
create_agent(chat, [], name="unmodified").invoke({"messages": [("user", "go")]})
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
        assert "traceparent" in server.requests[0].headers
    assert names == ["chat m", "invoke_agent unmodified"]


def test_the_light_tracer_works_where_opentelemetry_cannot_be_imported(tmp_path: Any) -> None:
    code = """
        import sys
        sys.modules["opentelemetry"] = None
        import agentlightning_langchain
        agentlightning_langchain.instrument()
    """
    (script := tmp_path / "agent.py").write_text(textwrap.dedent(code) + AGENT_SCRIPT)
    with ScriptedServer() as server:
        done = subprocess.run(
            [sys.executable, str(script), server.openai_url],
            env={**os.environ, ENV_URL: server.url, ENV_TRACER: "light"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert sorted(span.name for span in server.spans) == ["chat m", "invoke_agent unmodified"]
