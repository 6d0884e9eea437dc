# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import agents as sdk
import pytest
from agents import (
    Agent,
    FunctionTool,
    GuardrailFunctionOutput,
    InputGuardrail,
    ModelRetrySettings,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIProvider,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
    retry_policies,
)
from agents.models import _openai_shared
from agents.tracing.processors import BackendSpanExporter
from openai import AsyncOpenAI
from pydantic import BaseModel
from tests.adapters.recorded import Recorded, answered, recording, sent
from tests.adapters.scripted_server import ScriptedServer, call, fail, say, stall
from tests.core.span_receiver import SpanReceiver, send, without_ids_and_times

import agentlightning_openai_agents
from agentlightning import openai_sdk, semconv
from agentlightning.context import ENV_KEY, ENV_TRACER, ENV_URL, ActiveRollout, open_span, use_rollout
from agentlightning.rewards import emit_reward
from agentlightning.tracing import configure, trace
from agentlightning.tracing.guard import failures
from agentlightning.types import Reward, Span, SpanStatus, live_rollout_id
from agentlightning_openai_agents import LightningTracingProcessor, record


class Answer(BaseModel):
    a: int


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@function_tool
def boom(x: str) -> str:
    """Always fails."""
    raise RuntimeError(f"tool broke {x}")


@function_tool
def validates(x: str) -> str:
    """Fails with the library's error of its own schema, from the inside."""
    return str(Answer.model_validate({"a": x}))


@function_tool(failure_error_function=lambda _context, error: f"own words: {error}")
async def worded(x: str) -> str:
    """Fails, and says so in its own words."""
    raise KeyError(x)


@function_tool(timeout=0.05)
async def slow() -> str:
    """Takes too long."""
    await asyncio.sleep(5)
    return "late"


@function_tool(failure_error_function=None)
async def fatal(x: str) -> str:
    """Ends the run when it fails."""
    raise RuntimeError(f"tool broke {x}")


@pytest.fixture(autouse=True)
def instrumented() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    agentlightning_openai_agents.instrument()
    before = failures.total()
    yield
    agentlightning_openai_agents.uninstrument()
    assert open_span() is None
    assert failures.total() == before


Run = Callable[..., Any]


@asynccontextmanager
async def asking(server: ScriptedServer, **settings: Any) -> AsyncGenerator[RunConfig]:
    """A run's configuration whose models ask this server, through whatever API the SDK chooses."""
    retries = settings.pop("max_retries", 0)
    async with AsyncOpenAI(base_url=server.openai_url, api_key="k", max_retries=retries) as client:
        yield configured(client, **settings)


def configured(client: AsyncOpenAI, use_responses: bool | None = None, **settings: Any) -> RunConfig:
    provider = OpenAIProvider(openai_client=client, use_responses=use_responses)
    return RunConfig(model_provider=provider, **settings)


async def run_async(agent: Agent[Any], server: ScriptedServer, given: Any = "go", **settings: Any) -> Any:
    async with asking(server, **settings.pop("config", {})) as config:
        return await Runner.run(agent, given, run_config=config, **settings)


async def run_stream(agent: Agent[Any], server: ScriptedServer, given: Any = "go", **settings: Any) -> Any:
    around = open_span()
    async with asking(server, **settings.pop("config", {})) as config:
        result = Runner.run_streamed(agent, given, run_config=config, **settings)
        async for _ in result.stream_events():
            assert open_span() is around  # the agent's spans are not the consumer's
        return result


async def run_sync(agent: Agent[Any], server: ScriptedServer, given: Any = "go", **settings: Any) -> Any:
    """In a thread of its own, as a synchronous program."""

    def work() -> Any:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        client = AsyncOpenAI(base_url=server.openai_url, api_key="k", max_retries=0)
        config = configured(client, **settings.pop("config", {}))
        try:
            return Runner.run_sync(agent, given, run_config=config, **settings)
        finally:
            loop.run_until_complete(client.close())
            asyncio.set_event_loop(None)
            loop.close()

    return await asyncio.to_thread(work)


EVERY_WAY: list[Run] = [run_async, run_stream, run_sync]


def helper(name: str, *tools: Any, model: str = "m", **settings: Any) -> Agent[Any]:
    given: dict[str, Any] = {"instructions": "sys", **settings}
    return Agent(name, model=model, tools=list(tools), **given)


def agent_names(spans: list[Span]) -> list[Any]:
    return [span.attributes.get(semconv.AGENT_NAME) for span in spans]


def node_paths(spans: list[Span]) -> list[Any]:
    return [span.attributes.get(semconv.NODE_PATH) for span in spans]


# --- what is recorded ----------------------------------------------------------------------------


def test_a_run_is_recorded_call_by_call(server: ScriptedServer) -> None:
    server.given(call(("add", {"a": 1, "b": 2}), text="let me see"), say("three"))
    settings = ModelSettings(
        temperature=0.5, max_tokens=9, extra_args={"seed": 3, "stop": ["END"]}, extra_body={"n": 1}
    )
    asyncio.run(run_async(helper("calc", add, model_settings=settings), server))
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tree() == [
        ("invoke_agent calc", None),
        ("chat m", "invoke_agent calc"),
        ("execute_tool add", "invoke_agent calc"),
        ("chat m", "invoke_agent calc"),
    ]
    assert agent_names(seen.spans) == ["calc"] * 4
    assert node_paths(seen.spans) == ["calc"] * 4
    first, second = seen.llm
    assert answered(first) == server.requests[0].reply.message
    assert answered(second) == {"role": "assistant", "content": "three"}
    assert json.loads(str(first.attributes[semconv.TOOL_DEFINITIONS])) == server.requests[0].body["tools"]
    expected = {
        semconv.REQUEST_MODEL: "m",
        semconv.REQUEST_TEMPERATURE: 0.5,
        semconv.REQUEST_MAX_TOKENS: 9,
        semconv.REQUEST_SEED: 3,
        semconv.REQUEST_STOP: ["END"],
        semconv.REQUEST_CHOICES: 1,
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
    assert tool.attributes[semconv.TOOL_DESCRIPTION] == "Add two numbers."
    assert first.end_ns <= tool.start_ns <= tool.end_ns <= second.start_ns


@pytest.mark.parametrize("run", EVERY_WAY)
def test_every_way_to_run_an_agent_gives_the_same_calls(server: ScriptedServer, run: Run) -> None:
    server.given(call(("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})), say("three"))
    result = asyncio.run(run(helper("calc", add), server))
    assert result.final_output == "three"
    seen = Recorded(server)
    seen.assert_joined()
    assert agent_names(seen.llm) == ["calc", "calc"]
    assert seen.tool_statuses() == {"add_0": "ok", "add_1": "ok"}
    assert {seen.parent(span) for span in seen.llm + seen.tools} == {"invoke_agent calc"}
    assert answered(seen.llm[0]) == server.requests[0].reply.message
    streamed = run is run_stream
    assert [span.attributes.get(semconv.REQUEST_STREAM) for span in seen.llm] == [streamed or None] * 2
    assert seen.llm[0].attributes[semconv.RESPONSE_ID] == server.requests[0].response_id
    assert seen.llm[0].attributes[semconv.RESPONSE_FINISH_REASONS] == ["tool_calls"]


def test_the_usage_of_a_stream_is_recorded_where_it_is_asked_for(server: ScriptedServer) -> None:
    asyncio.run(run_stream(helper("calc", model_settings=ModelSettings(include_usage=True)), server))
    (span,) = Recorded(server).llm
    assert (span.attributes[semconv.USAGE_INPUT], span.attributes[semconv.USAGE_OUTPUT]) == (7, 4)


@pytest.mark.parametrize("run", [run_async, run_stream])
@pytest.mark.parametrize("traced", [True, False])
def test_every_way_a_tool_call_ends_is_told_apart(server: ScriptedServer, run: Run, traced: bool) -> None:
    bare = FunctionTool("bare", "Not made by a decorator.", {}, _bare, strict_json_schema=False)
    server.given(
        call(
            ("add", {"a": 1, "b": 2}),
            ("boom", {"x": "q"}),
            ("nope", {}),
            ("add", {"a": "z"}),
            ("add", "{not json"),
            ("validates", {"x": "z"}),
            ("worded", {"x": "k"}),
            ("slow", {}),
            ("bare", {}),
        ),
        say("done"),
    )
    config = {"tool_not_found_behavior": "return_error_to_model", "tracing_disabled": not traced}
    agent = helper("calc", add, boom, validates, worded, slow, bare)
    assert asyncio.run(run(agent, server, config=config)).final_output == "done"
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.tool_statuses() == {
        "add_0": "ok",
        "boom_1": "raised",
        "nope_2": "unknown_tool",
        "add_3": "bad_arguments",
        "add_4": "bad_arguments",
        "validates_5": "raised",
        "worded_6": "raised",
        "slow_7": "raised",
        "bare_8": "ok",
    }
    broken = seen.one("execute_tool boom")
    assert (broken.status, broken.status_message) == (SpanStatus.ERROR, "tool broke q")
    assert broken.attributes[semconv.ERROR_TYPE] == "RuntimeError"
    told = {m["tool_call_id"]: m["content"] for m in sent(seen.llm[1]) if m["role"] == "tool"}
    assert broken.attributes[semconv.TOOL_RESULT] == told[broken.attributes[semconv.TOOL_CALL_ID]]
    assert seen.one("execute_tool worded").attributes[semconv.ERROR_TYPE] == "KeyError"
    assert seen.one("execute_tool slow").attributes[semconv.ERROR_TYPE] == "ToolTimeoutError"
    assert seen.one("execute_tool nope").status is SpanStatus.ERROR
    unparsed = next(s for s in seen.tools if s.attributes[semconv.TOOL_ARGUMENTS] == "{not json")
    assert unparsed.status is SpanStatus.ERROR
    assert {seen.parent(span) for span in seen.tools} == {"invoke_agent calc"}
    assert set(agent_names(seen.tools)) == {"calc"}


async def _bare(context: Any, arguments: str) -> str:
    return "fine"


async def _bare_failing(context: Any, arguments: str) -> str:
    raise RuntimeError("tool broke inside")


@pytest.mark.parametrize("run", EVERY_WAY)
@pytest.mark.parametrize("tool", ["fatal", "bare"])
def test_a_tool_that_ends_the_run_is_recorded_and_so_is_the_run(
    server: ScriptedServer, run: Run, tool: str
) -> None:
    server.given(call((tool, {"x": "inside"})))
    bare = FunctionTool("bare", "", {}, _bare_failing, strict_json_schema=False)
    with pytest.raises(sdk.UserError, match="tool broke inside"):
        asyncio.run(run(helper("calc", fatal, bare), server))
    seen = Recorded(server)
    (span,) = seen.tools
    assert (span.attributes[semconv.TOOL_STATUS], span.status_message) == ("raised", "tool broke inside")
    assert span.attributes[semconv.ERROR_TYPE] == "RuntimeError"
    assert seen.agents[0].status is SpanStatus.ERROR


@pytest.mark.parametrize("run", EVERY_WAY)
def test_an_unknown_tool_that_ends_the_run_is_recorded(server: ScriptedServer, run: Run) -> None:
    server.given(call(("add", {"a": 1, "b": 2}), ("nope", {"x": 1})))
    with pytest.raises(sdk.ModelBehaviorError, match="nope"):
        asyncio.run(run(helper("calc", add), server))
    seen = Recorded(server)
    seen.assert_joined()
    (span,) = seen.tools
    assert (span.name, span.attributes[semconv.TOOL_STATUS]) == ("execute_tool nope", "unknown_tool")
    assert span.attributes[semconv.TOOL_ARGUMENTS] == '{"x": 1}'
    assert seen.parent(span) == "invoke_agent calc"
    assert seen.agents[0].attributes[semconv.ERROR_TYPE] == "ModelBehaviorError"


def test_a_call_that_waits_for_approval_is_no_failure(server: ScriptedServer) -> None:
    @function_tool(needs_approval=True)
    def risky() -> str:
        """Needs a person."""
        return "done"

    async def main(approve: bool) -> None:
        agent = helper("calc", risky)
        paused = await run_async(agent, server)
        state = paused.to_state()
        if approve:
            state.approve(paused.interruptions[0])
        else:
            state.reject(paused.interruptions[0], always_reject=True)
        assert (await run_async(agent, server, state)).final_output == "ok"

    server.given(call(("risky", {})), say("ok"))
    asyncio.run(main(approve=True))
    server.given(call(("risky", {})), call(("risky", {})), say("ok"))
    asyncio.run(main(approve=False))
    seen = Recorded(server)
    seen.assert_joined()
    waiting, approved, _, rejected = seen.tools
    assert [event.name for event in waiting.events] == ["interrupted"]
    assert (waiting.status, semconv.TOOL_STATUS in waiting.attributes) == (SpanStatus.UNSET, False)
    assert approved.attributes[semconv.TOOL_STATUS] == "ok"
    assert rejected.attributes[semconv.TOOL_STATUS] == "raised"


def test_structured_output_is_recorded_as_it_was_said(server: ScriptedServer) -> None:
    server.given(say('{"a": 1}'))
    result = asyncio.run(run_async(helper("calc", output_type=Answer), server))
    assert result.final_output == Answer(a=1)
    seen = Recorded(server)
    seen.assert_joined()
    assert answered(seen.llm[0]) == {"role": "assistant", "content": '{"a": 1}'}


# --- names and places ----------------------------------------------------------------------------


@pytest.mark.parametrize("run", EVERY_WAY)
@pytest.mark.parametrize("traced", [True, False])
def test_an_agent_as_a_tool_keeps_its_name_and_place(server: ScriptedServer, run: Run, traced: bool) -> None:
    server.given(call(("ask", {"input": "x"}), ("ask", {"input": "y"})), say("fin"), model="outer")
    inner = helper("inner", model="inner").as_tool("ask", "Ask another agent.")
    asyncio.run(run(helper("boss", inner, model="outer"), server, config={"tracing_disabled": not traced}))
    seen = Recorded(server)
    seen.assert_joined()
    assert sorted(seen.tree(), key=str) == [
        ("chat inner", "invoke_agent inner"),
        ("chat inner", "invoke_agent inner"),
        ("chat outer", "invoke_agent boss"),
        ("chat outer", "invoke_agent boss"),
        ("execute_tool ask", "invoke_agent boss"),
        ("execute_tool ask", "invoke_agent boss"),
        ("invoke_agent boss", None),
        ("invoke_agent inner", "execute_tool ask"),
        ("invoke_agent inner", "execute_tool ask"),
    ]
    assert len({span.parent_id for span in seen.agents}) == 3
    assert len({span.trace_id for span in seen.spans}) == 1
    assert sorted(zip(agent_names(seen.llm), node_paths(seen.llm), strict=True)) == [
        ("boss", "boss"),
        ("boss", "boss"),
        ("inner", "boss/inner"),
        ("inner", "boss/inner"),
    ]


@pytest.mark.parametrize("run", EVERY_WAY)
@pytest.mark.parametrize("traced", [True, False])
def test_a_handoff_reads_as_the_order_of_agents(server: ScriptedServer, run: Run, traced: bool) -> None:
    server.given(call(("transfer_to_billing", {})), say("bye"), model="a")
    server.given(call(("transfer_to_triage", {})), model="b")
    billing = helper("billing", model="b")
    triage = helper("triage", model="a", handoffs=[billing])
    billing.handoffs.append(triage)
    asyncio.run(run(triage, server, config={"tracing_disabled": not traced}))
    seen = Recorded(server)
    seen.assert_joined()
    assert agent_names(seen.llm) == ["triage", "billing", "triage"]
    assert agent_names(seen.agents) == ["triage", "billing", "triage"]
    root, second, third = seen.agents
    assert (root.parent_id, second.parent_id, third.parent_id) == (None, root.span_id, root.span_id)
    assert [span.parent_id for span in seen.llm] == [root.span_id, second.span_id, third.span_id]
    assert second.end_ns <= third.start_ns
    told = [[(e.name, e.attributes[semconv.AGENT_NAME]) for e in span.events] for span in seen.agents]
    assert told == [[("handoff", "billing")], [("handoff", "triage")], []]
    assert [(s.name, s.attributes[semconv.TOOL_STATUS]) for s in seen.tools] == [
        ("execute_tool transfer_to_billing", "ok"),
        ("execute_tool transfer_to_triage", "ok"),
    ]
    assert seen.tools[0].attributes[semconv.TOOL_RESULT] == '{"assistant": "billing"}'


def test_only_the_first_of_several_handoffs_is_made(server: ScriptedServer) -> None:
    server.given(call(("transfer_to_b", {}), ("transfer_to_c", {})))
    b, c = helper("b"), helper("c")
    asyncio.run(run_async(helper("a", handoffs=[b, c]), server))
    seen = Recorded(server)
    assert agent_names(seen.llm) == ["a", "b"]
    assert [s.attributes[semconv.TOOL_STATUS] for s in seen.tools] == ["ok", "raised"]


def test_a_handoff_with_arguments_that_do_not_fit_is_a_bad_call(server: ScriptedServer) -> None:
    async def taken(context: Any, given: Answer) -> None: ...

    server.given(call(("transfer_to_b", {"a": "z"})))
    handoff = sdk.handoff(helper("b"), on_handoff=taken, input_type=Answer)
    with pytest.raises(sdk.ModelBehaviorError):
        asyncio.run(run_async(helper("a", handoffs=[handoff]), server))
    (span,) = Recorded(server).tools
    assert span.attributes[semconv.TOOL_STATUS] == "bad_arguments"


@pytest.mark.parametrize("run", EVERY_WAY)
def test_an_agent_in_a_guardrail_has_its_own_run(server: ScriptedServer, run: Run) -> None:
    async def judge(context: Any, agent: Any, given: Any) -> GuardrailFunctionOutput:
        result = await run_async(helper("judge", model="j"), server)
        return GuardrailFunctionOutput(result.final_output, tripwire_triggered=result.final_output == "bad")

    server.given(say("fine"), say("bad"), model="j")
    guarded = helper("calc", input_guardrails=[InputGuardrail(judge)])
    assert asyncio.run(run(guarded, server)).final_output == "ok"
    with pytest.raises(sdk.InputGuardrailTripwireTriggered):
        asyncio.run(run(guarded, server))
    seen = Recorded(server)
    assert {seen.parent(span) for span in seen.llm} == {"invoke_agent calc", "invoke_agent judge"}
    judges = [span for span in seen.agents if span.name == "invoke_agent judge"]
    assert [seen.parent(span) for span in judges] == ["invoke_agent calc"] * 2
    runs = [span for span in seen.agents if span.name == "invoke_agent calc"]
    assert [span.attributes.get(semconv.ERROR_TYPE) for span in runs] == [
        None,
        "InputGuardrailTripwireTriggered",
    ]


def test_a_bare_call_of_a_model_is_a_trace_of_its_own(server: ScriptedServer) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=server.openai_url, api_key="k") as client:
            model = OpenAIChatCompletionsModel("m", client)
            await model.get_response(
                "sys", "hi", ModelSettings(), [], None, [], sdk.ModelTracing.DISABLED,
                previous_response_id=None, conversation_id=None, prompt=None,
            )  # fmt: skip
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])

    asyncio.run(main())
    seen = Recorded(server)
    assert seen.tree() == [("chat m", None)]  # the SDK without an agent is not this adapter's
    assert "traceparent" in server.requests[0].headers


# --- concurrency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", EVERY_WAY)
def test_two_rollouts_at_once_keep_apart(server: ScriptedServer, run: Run) -> None:
    rewards: dict[str, list[Reward]] = {"a": [], "b": []}

    @function_tool
    def score() -> str:
        """A plain function, which the SDK runs in a thread."""
        emit_reward(0.5)
        return "scored"

    async def one(name: str) -> None:
        server.given(call(("score", {}), ("score", {})), say("done"), model=name)
        active = ActiveRollout(name, f"{name}-1", server.openai_url, report_reward=rewards[name].append)
        with use_rollout(active):
            await run(helper(name, score, model=name), server)

    async def main() -> None:
        await asyncio.gather(one("a"), one("b"))

    asyncio.run(main())
    seen = Recorded(server)
    seen.assert_joined()
    assert len(seen.llm) == 4
    for span in seen.spans:
        assert span.attempt_id == f"{span.rollout_id}-1"
        assert span.attributes[semconv.AGENT_NAME] == span.rollout_id
    assert [len(given) for given in rewards.values()] == [2, 2]


def test_runs_in_threads_keep_apart(server: ScriptedServer) -> None:
    def work(name: str) -> None:
        with use_rollout(ActiveRollout(name, f"{name}-1", server.openai_url)):
            asyncio.run(run_async(helper(name, model=name), server))

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


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", EVERY_WAY)
def test_a_server_error_is_the_calls_and_the_agents_error(server: ScriptedServer, run: Run) -> None:
    server.given(fail(500))
    with pytest.raises(Exception, match="scripted 500"):
        asyncio.run(run(helper("calc"), server))
    seen = Recorded(server)
    assert [(span.name, span.status) for span in seen.spans] == [
        ("invoke_agent calc", SpanStatus.ERROR),
        ("chat m", SpanStatus.ERROR),
    ]
    assert seen.llm[0].attributes[semconv.ERROR_TYPE] == "InternalServerError"
    assert semconv.OUTPUT_MESSAGES not in seen.llm[0].attributes
    assert seen.llm[0].span_id in server.requests[0].headers["traceparent"]


@pytest.mark.parametrize("run", [run_async, run_stream])
def test_a_request_that_the_openai_sdk_retries_is_one_call(server: ScriptedServer, run: Run) -> None:
    server.given(fail(429), say("ok"))
    asyncio.run(run(helper("calc"), server, config={"max_retries": 2}))
    seen = Recorded(server)
    seen.assert_joined(answered=1)
    assert len({request.headers["traceparent"] for request in server.requests}) == 1


def test_a_call_that_the_runner_retries_is_several(server: ScriptedServer) -> None:
    server.given(fail(500), say("ok"))
    retry = ModelRetrySettings(
        max_retries=2, policy=retry_policies.http_status([500]), backoff={"initial_delay": 0.001}
    )
    asyncio.run(run_async(helper("calc", model_settings=ModelSettings(retry=retry)), server))
    seen = Recorded(server)
    seen.assert_joined(answered=1)
    assert [span.status for span in seen.llm] == [SpanStatus.ERROR, SpanStatus.UNSET]


@pytest.mark.parametrize("run", EVERY_WAY)
def test_a_run_with_too_many_turns_fails(server: ScriptedServer, run: Run) -> None:
    server.given(call(("add", {"a": 1, "b": 2})), call(("add", {"a": 1, "b": 2})))
    with pytest.raises(sdk.MaxTurnsExceeded):
        asyncio.run(run(helper("calc", add), server, max_turns=1))
    seen = Recorded(server)
    seen.assert_joined()
    assert seen.agents[0].attributes[semconv.ERROR_TYPE] == "MaxTurnsExceeded"
    assert len(seen.llm) == 1


@pytest.mark.parametrize("run", [run_async, run_stream])
def test_a_cancelled_run_closes_its_spans(server: ScriptedServer, run: Run) -> None:
    server.given(stall(), model="inner").given(call(("ask", {"input": "x"})), model="outer")
    inner = helper("inner", model="inner").as_tool("ask", "")

    async def main() -> None:
        task = asyncio.create_task(run(helper("calc", inner, model="outer"), server))
        assert await asyncio.to_thread(server.stalled.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        server.release.set()

    asyncio.run(main())
    seen = Recorded(server)
    assert [(span.name, span.attributes.get(semconv.ERROR_TYPE)) for span in seen.spans] == [
        ("invoke_agent calc", "CancelledError"),
        ("chat outer", None),
        ("execute_tool ask", "CancelledError"),
        ("invoke_agent inner", "CancelledError"),
        ("chat inner", "CancelledError"),
    ]
    assert all(s.status is SpanStatus.ERROR for s in seen.spans if s.name != "chat outer")


def test_a_streamed_run_that_its_reader_cancels_is_closed(server: ScriptedServer) -> None:
    server.given(say("a long answer"))

    async def main() -> None:
        async with asking(server) as config:
            result = Runner.run_streamed(helper("calc"), "go", run_config=config)
            async for event in result.stream_events():
                if event.type == "raw_response_event":
                    result.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await result.run_loop_task  # type: ignore[misc]

    asyncio.run(main())
    seen = Recorded(server)
    assert [span.name for span in seen.spans] == ["invoke_agent calc", "chat m"]


def test_a_stream_of_a_model_that_is_left_early_is_closed(server: ScriptedServer) -> None:
    server.given(say("a long answer"))

    async def main() -> None:
        async with AsyncOpenAI(base_url=server.openai_url, api_key="k") as client:
            model = OpenAIChatCompletionsModel("m", client)
            stream = model.stream_response(
                "sys", "hi", ModelSettings(), [], None, [], sdk.ModelTracing.DISABLED,
                previous_response_id=None, conversation_id=None, prompt=None,
            )  # fmt: skip
            async with contextlib.aclosing(stream):  # type: ignore[type-var]
                async for _ in stream:
                    assert open_span() is None
                    break

    asyncio.run(main())
    (span,) = Recorded(server).llm
    assert span.attributes[semconv.ERROR_TYPE] == "GeneratorExit"


@pytest.mark.parametrize("run", EVERY_WAY)
@pytest.mark.parametrize(
    "places",
    [
        ["runs.start_agent"],
        ["llm.start_llm", "tools.start_tool"],
        ["llm.end_llm", "tools.end_tool"],
        ["chat.ChatStream.add", "chat.completion", "chat.request", "tools.is_recording"],
    ],
)
def test_a_hook_that_fails_does_not_reach_the_agent(
    server: ScriptedServer, run: Run, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("bug in the adapter")

    for place in places:
        monkeypatch.setattr(f"agentlightning_openai_agents.{place}", broken)
    server.given(call(("add", {"a": 1, "b": 2}), ("boom", {"x": "q"})), call(("transfer_to_b", {})))
    before = failures.copy()
    agent = helper("calc", add, boom, handoffs=[helper("b")])
    assert asyncio.run(run(agent, server)).final_output == "ok"
    # Either the run, or its three model calls and three tool calls.
    assert failures.total() >= before.total() + (1 if places == ["runs.start_agent"] else 6)
    failures.clear()
    failures.update(before)


# --- what is recorded when -----------------------------------------------------------------------


def test_a_live_run_is_one_rollout_and_the_processor_knows_it(server: ScriptedServer) -> None:
    processor = agentlightning_openai_agents.instrument()
    inner = helper("inner").as_tool("ask", "")
    asyncio.run(run_async(helper("calc", inner, handoffs=[helper("b")]), server))
    first = Recorded(server).spans[0]
    assert processor.rollout_id == live_rollout_id(first.trace_id)
    with use_rollout(ActiveRollout("r", "r-1")):
        asyncio.run(run_async(helper("calc"), server))
    assert processor.rollout_id == "r"


def test_a_trace_of_the_sdk_or_ours_holds_several_runs(server: ScriptedServer) -> None:
    async def main() -> None:
        with sdk.trace("sdk"):
            await run_async(helper("a"), server)
            await run_stream(helper("b"), server)
        with trace("ours") as ours:
            await run_async(helper("c"), server)
            emit_reward(1.0)
        assert ours.rollout_id == live_rollout_id(ours.trace_id)

    asyncio.run(main())
    seen = Recorded(server)
    seen.assert_joined()
    assert {
        (s.name, seen.parent(s)) for s in seen.spans if s.attributes.get(semconv.OPERATION) != "chat"
    } == {
        ("sdk", None),
        ("invoke_agent a", "sdk"),
        ("invoke_agent b", "sdk"),
        ("ours", None),
        ("invoke_agent c", "ours"),
        ("reward reward", "ours"),
    }
    assert len({span.trace_id for span in seen.spans}) == 2


@pytest.mark.parametrize("run", EVERY_WAY)
def test_one_run_alone_can_be_recorded(server: ScriptedServer, run: Run) -> None:
    agentlightning_openai_agents.uninstrument()

    async def main() -> str | None:
        await run(helper("before"), server, config={"use_responses": False})
        with record() as recording:
            assert recording.rollout_id is None
            await run(helper("calc", add), server)
        await run(helper("after"), server, config={"use_responses": False})
        return recording.rollout_id

    server.given(say("ok"), call(("add", {"a": 1, "b": 2})), say("ok"))
    rollout_id = asyncio.run(main())
    seen = Recorded(server)
    assert agent_names(seen.agents) == ["calc"]
    assert len(seen.llm) == 2
    assert len(seen.tools) == 1
    assert rollout_id == live_rollout_id(seen.agents[0].trace_id)
    assert ["traceparent" in request.headers for request in server.requests] == [False, True, True, False]


@pytest.mark.parametrize("run", EVERY_WAY)
def test_a_processor_of_ones_own_records_what_the_sdk_traces(server: ScriptedServer, run: Run) -> None:
    agentlightning_openai_agents.uninstrument()
    processor = LightningTracingProcessor()
    before = sdk.tracing.get_trace_provider()._multi_processor._processors  # type: ignore[attr-defined]
    sdk.set_trace_processors([processor])
    try:
        server.given(call(("ask", {"input": "x"})), model="o")
        inner = helper("inner").as_tool("ask", "")
        asyncio.run(run(helper("calc", inner, model="o"), server))
        asyncio.run(run(helper("untraced"), server, config={"tracing_disabled": True}))

        async def several() -> None:
            with sdk.trace("several"):
                await run(helper("a"), server)

        asyncio.run(several())
        agentlightning_openai_agents.instrument()  # beside it, nothing is recorded twice
        asyncio.run(run(helper("both"), server))
    finally:
        sdk.set_trace_processors(list(before))
    seen = Recorded(server)
    assert agent_names(seen.agents) == ["calc", "inner", "a", "both"]
    assert [seen.parent(span) for span in seen.agents] == [None, "execute_tool ask", "several", None]
    assert processor.rollout_id == live_rollout_id(seen.agents[-1].trace_id)
    assert agent_names(seen.llm) == ["calc", "inner", "calc", "a", "both"]


class Kinds(sdk.TracingProcessor):
    """Notes what the SDK tells any processor."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_trace_start(self, trace: Any) -> None:
        self.told.append(trace.name)

    def on_trace_end(self, trace: Any) -> None:
        self.told.append(trace.name)

    def on_span_start(self, span: Any) -> None:
        self.told.append(span.span_data.type)

    def on_span_end(self, span: Any) -> None:
        self.told.append((span.span_data.type, span.error, getattr(span.span_data, "output", None)))

    def shutdown(self) -> None: ...
    def force_flush(self) -> None: ...


@pytest.mark.parametrize("run", EVERY_WAY)
def test_other_processors_and_hooks_are_told_the_same_as_without(server: ScriptedServer, run: Run) -> None:
    class Hooks(sdk.RunHooks[Any]):
        async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: object) -> None:
            other.told.append((tool.name, result))

    def told() -> list[Any]:
        server.given(call(("add", {"a": 1, "b": 2})), call(("boom", {"x": "q"})), say("three"))
        asyncio.run(run(helper("calc", add, boom), server, config={"use_responses": False}, hooks=Hooks()))
        taken, other.told = other.told, []
        return [re.sub(r"_\d+\b|chatcmpl-\d+|\d+\.\d+", "", json.dumps(item)) for item in taken]

    before = sdk.tracing.get_trace_provider()._multi_processor._processors  # type: ignore[attr-defined]
    sdk.set_trace_processors([*before, other := Kinds()])
    try:
        with_us = told()
        agentlightning_openai_agents.uninstrument()
        assert with_us == told()
    finally:
        sdk.set_trace_processors(list(before))


def test_instrumenting_twice_records_once_and_undoing_it_records_nothing(server: ScriptedServer) -> None:
    agentlightning_openai_agents.instrument()
    asyncio.run(run_async(helper("calc"), server))
    assert len(Recorded(server).llm) == 1
    agentlightning_openai_agents.uninstrument()
    assert not openai_sdk._patches

    async def main() -> None:
        with sdk.trace("sdk"):
            async with AsyncOpenAI(base_url=server.openai_url, api_key="k") as client:
                agent = Agent("calc", model=OpenAIChatCompletionsModel("m", client))
                await Runner.run(agent, "go")

    asyncio.run(main())
    assert len(Recorded(server).spans) == 2
    assert "traceparent" not in server.requests[1].headers


def test_uninstrumenting_gives_back_the_functions_of_the_sdk() -> None:
    code = """
        import agents.run, agents.tool, agents.run_internal.tool_execution, agents.models.openai_provider
        from openai.resources.chat.completions import AsyncCompletions
        def functions():
            batch = agents.run_internal.tool_execution._FunctionToolBatchExecutor
            return [agents.run.AgentRunner.run, agents.run.run_single_turn, AsyncCompletions.create,
                    batch._run_single_tool, agents.tool.maybe_invoke_function_tool_failure_error_function,
                    agents.models.openai_provider.OpenAIProvider.get_model]
        before = functions()
        import agentlightning_openai_agents as adapter
        adapter.instrument()
        during = functions()
        adapter.uninstrument()
        print(not any(map(lambda a, b: a is b, before, during)), functions() == before)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["True", "True"]
    assert "gone in this version" not in out.stderr


def test_without_a_server_nothing_is_recorded_and_the_agent_works(server: ScriptedServer) -> None:
    configure("")
    server.given(call(("add", {"a": 1, "b": 2})), say("three"))

    async def main() -> None:
        async with AsyncOpenAI(base_url=server.openai_url, api_key="k") as client:
            agent = helper("calc", add, model=OpenAIChatCompletionsModel("m", client))  # type: ignore[arg-type]
            with record() as recording:
                assert (await Runner.run(agent, "go")).final_output == "three"
            assert recording.rollout_id is None

    asyncio.run(main())
    assert "traceparent" not in server.requests[0].headers
    assert server.spans == []


def test_both_tracers_record_the_same() -> None:
    def shape(tracer: str) -> list[Span]:
        with recording(tracer) as server:
            server.given(call(("add", {"a": 1, "b": 2}), ("boom", {"x": "q"})), say("three"))
            asyncio.run(run_async(helper("calc", add, boom), server))
            return without_ids_and_times(Recorded(server).spans)

    assert shape("light") == shape("otel")


# --- the Responses API, and OpenAI's own server --------------------------------------------------


class ResponsesServer(ScriptedServer):
    """A server that is not ours, and takes the Responses API; `script` is that of chat."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, Any]] = []

    def respond(self, handler: BaseHTTPRequestHandler, headers: dict[str, str], body: bytes) -> None:
        if not handler.path.endswith("/responses"):
            super().respond(handler, headers, body)
            return
        assert "traceparent" not in headers
        request = json.loads(body)
        self.asked.append(request)
        response = _as_response(request, self.script[request["model"]].popleft().message)
        if not request.get("stream"):
            send(handler, 200, json.dumps(response).encode(), content_type="application/json")
            return
        event = {"type": "response.completed", "sequence_number": 0, "response": response}
        data = b"event: response.completed\ndata: " + json.dumps(event).encode() + b"\n\n"
        send(handler, 200, data, content_type="text/event-stream")


def _as_response(request: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    output: list[dict[str, Any]] = [
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}]}
    ]
    if message.get("content"):
        text = {"type": "output_text", "text": message["content"], "annotations": []}
        output.append(
            {"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": [text]}
        )
    for asked in message.get("tool_calls", []):
        output.append({"type": "function_call", "call_id": asked["id"], **asked["function"]})
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    usage = {"input_tokens": 7, "output_tokens": 4, "total_tokens": 11, **details}
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "tools": [],
        "model": request["model"], "output": output, "usage": usage, "tool_choice": "auto",
        "parallel_tool_calls": True, "incomplete_details": None, "error": None,
    }  # fmt: skip


@pytest.mark.parametrize("run", EVERY_WAY)
def test_another_server_is_asked_through_the_sdks_default_api_and_recorded(
    server: ScriptedServer, run: Run
) -> None:
    with ResponsesServer() as elsewhere:
        elsewhere.given(call(("add", {"a": 1, "b": 2}), text="let me see"), say("three"))
        settings = ModelSettings(temperature=0.5, max_tokens=9)
        result = asyncio.run(run(helper("calc", add, model_settings=settings), elsewhere))
        assert result.final_output == "three"
        assert len(elsewhere.asked) == 2
        seen = Recorded(server)
        first, second = seen.llm
        assert [seen.parent(span) for span in seen.llm] == ["invoke_agent calc"] * 2
        asked = {"id": "call_add_0", "type": "function"}
        function = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
        said = {
            "role": "assistant",
            "content": "let me see",
            "reasoning_content": "hm",
            "tool_calls": [{**asked, "function": function}],
        }
        assert answered(first) == said
        assert sent(first) == [{"role": "system", "content": "sys"}, {"role": "user", "content": "go"}]
        assert sent(second)[2:] == [said, {"role": "tool", "tool_call_id": "call_add_0", "content": "3"}]
        (tool,) = json.loads(str(first.attributes[semconv.TOOL_DEFINITIONS]))
        assert tool["function"]["name"] == "add"
        expected = {
            semconv.REQUEST_TEMPERATURE: 0.5,
            semconv.REQUEST_MAX_TOKENS: 9,
            semconv.RESPONSE_ID: "resp_1",
            semconv.RESPONSE_FINISH_REASONS: ["tool_calls"],
            semconv.USAGE_INPUT: 7,
            semconv.USAGE_OUTPUT: 4,
            semconv.REQUEST_STREAM: True if run is run_stream else None,
        }
        assert {key: first.attributes.get(key) for key in expected} == expected
        assert second.attributes[semconv.RESPONSE_FINISH_REASONS] == ["stop"]
        assert seen.tool_statuses() == {"add_0": "ok"}


def test_only_models_at_our_server_are_asked_for_chat_completions(server: ScriptedServer) -> None:
    async def kind(url: str) -> type:
        async with AsyncOpenAI(base_url=url, api_key="k") as client:
            provider = OpenAIProvider(openai_client=client)
            model = type(provider.get_model("m"))
            assert provider._use_responses  # the user's provider is left as it is
            return model

    async def main() -> None:
        assert await kind(server.openai_url) is OpenAIChatCompletionsModel
        assert await kind("https://api.openai.com/v1") is OpenAIResponsesModel
        agentlightning_openai_agents.uninstrument()
        assert await kind(server.openai_url) is OpenAIResponsesModel

    asyncio.run(main())


class Ingest(SpanReceiver):
    """Where the SDK's exporter sends its own traces."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str] = []

    def respond(self, handler: BaseHTTPRequestHandler, headers: dict[str, str], body: bytes) -> None:
        self.keys.append(headers["authorization"])
        send(handler, 200, b"{}")


@pytest.mark.parametrize("named", ["key", "base_url", "client"])
def test_the_sdks_traces_are_not_sent_elsewhere_with_our_key(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "ours")
    if named == "key":
        monkeypatch.setenv(ENV_KEY, "ours")
    elif named == "base_url":
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)
    else:
        client = AsyncOpenAI(base_url=server.openai_url, api_key="ours")
        monkeypatch.setattr(_openai_shared, "_default_openai_client", client)
    items: Any = [sdk.trace("t"), sdk.trace("own key", tracing={"api_key": "sk-run"})]
    with Ingest() as ingest:
        for exporter in (
            BackendSpanExporter(endpoint=ingest.url),
            BackendSpanExporter("sk-real", endpoint=ingest.url),
        ):
            exporter.export(items)
            exporter.close()
        assert ingest.keys == ["Bearer sk-run", "Bearer sk-real", "Bearer sk-run"]
        agentlightning_openai_agents.uninstrument()
        exporter = BackendSpanExporter(endpoint=ingest.url)
        exporter.export(items)
        exporter.close()
        assert ingest.keys[3:] == ["Bearer ours", "Bearer sk-run"]


# --- scripts of their own ------------------------------------------------------------------------

AGENT_SCRIPT = """
from agents import Agent, Runner
Runner.run_sync(Agent("unmodified", model="m"), "go")
"""


@pytest.mark.parametrize("tracer", ["light", "otel"])
@pytest.mark.parametrize("traced", ["true", "false"])
def test_opentelemetry_instrument_records_an_unmodified_script(
    tracer: str, traced: str, tmp_path: Path
) -> None:
    (script := tmp_path / "agent.py").write_text(AGENT_SCRIPT)
    command = os.path.join(os.path.dirname(sys.executable), "opentelemetry-instrument")
    if not _installed():
        pytest.skip("the package's entry points are not installed here")
    with ScriptedServer() as server:
        done = _run([command, sys.executable, str(script)], server, tracer, traced)
        assert done.returncode == 0, done.stderr
        names = sorted(span.name for span in server.spans)
        assert [request.path for request in server.requests] == ["/v1/chat/completions"]
        assert "traceparent" in server.requests[0].headers
    assert names == ["chat m", "invoke_agent unmodified"]
    assert "Tracing" not in done.stderr  # the SDK's exporter is quiet


def _run(
    command: list[str], server: ScriptedServer, tracer: str, traced: str = "true"
) -> subprocess.CompletedProcess[str]:
    disabled = "0" if traced == "true" else "1"
    openai = {"OPENAI_BASE_URL": server.openai_url, "OPENAI_API_KEY": "k"}
    ours = {ENV_URL: server.url, ENV_TRACER: tracer, "OPENAI_AGENTS_DISABLE_TRACING": disabled}
    return subprocess.run(
        command,
        env={**os.environ, **openai, **ours},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _installed() -> bool:
    try:
        distribution("agentlightning")
    except PackageNotFoundError:
        return False
    return True


def test_the_light_tracer_works_without_opentelemetrys_sdk(tmp_path: Path) -> None:
    code = """
        import sys
        sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.instrumentation"] = None
        import agentlightning_openai_agents
        agentlightning_openai_agents.instrument()
    """
    (script := tmp_path / "agent.py").write_text(textwrap.dedent(code) + AGENT_SCRIPT)
    with ScriptedServer() as server:
        done = _run([sys.executable, str(script)], server, "light")
        assert done.returncode == 0, done.stderr
        assert sorted(span.name for span in server.spans) == ["chat m", "invoke_agent unmodified"]
