# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownParameterType=false
"""What recording costs a whole agent, beside OpenInference's instrumentation of the same framework.

One real agent of each framework calls a tool in each of its turns; the model answers inside the process (an
HTTP transport without a network), so the difference between runs with and without a recorder is the recorder.
All recorders take turns in one process, and of each the run that took least counts, for noise only adds. CPU
time is that of the whole process, the sending of the spans to a server in another process included, by OTLP
for all but the light tracer. `bare` only keeps the values that the framework hands to a hook: the least there
could be.

Runs of three shapes tell model calls and tool calls apart: one turn; ten turns more with one tool call each;
ten turns more with three each.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import httpx
from tests.bench.bench_adapters import span_sink

from agentlightning.tracing import configure, get_tracer

ROUNDS: Final = 25
TURNS: Final = 10
MORE_TOOLS: Final = 3
SHAPES: Final = ((0, 0), (TURNS, 1), (TURNS, MORE_TOOLS))
"""(turns with tool calls before the last turn, tool calls in each)."""
FRAMEWORKS: Final = ("langchain", "openai_agents", "autogen", "crewai")
SYSTEM: Final = "You are good at sums. Use the tools for every sum, and say the result at the end. " * 4

Run = Callable[[int, int], object]
"""Runs the agent: (turns with tool calls, tool calls in each)."""
Recorder = Callable[[], AbstractContextManager[object]]


def run() -> dict[str, float]:
    """Microseconds of CPU added per model call and per tool call, by framework and recorder."""
    results: dict[str, float] = {}
    for framework in FRAMEWORKS:  # one process each: instrumentations of one do not slow down another
        command = [sys.executable, "-m", "tests.bench.bench_instrumentations", framework]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=_environment())
        results |= json.loads(done.stdout.splitlines()[-1])
    return results


def _environment() -> dict[str, str]:
    quiet = {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false"}
    return {**os.environ, **quiet, "OPENAI_API_KEY": "k", "OPENAI_AGENTS_DISABLE_TRACING": "0"}


def measure(framework: str) -> dict[str, float]:
    """The numbers of one framework."""
    least: dict[str, list[float]] = {}
    with span_sink() as url:
        agent = AGENTS[framework](f"{url}/v1")  # our server's origin, so that requests carry our headers
        recorders = {"none": contextlib.nullcontext, **recorders_of(framework, url)}
        for name, recorder in recorders.items():
            with recorder():  # warm
                agent(2, 2)
            least[name] = [float("inf")] * len(SHAPES)
        gc.disable()
        for _ in range(ROUNDS):
            for shape, (turns, tools) in enumerate(SHAPES):
                for name, recorder in recorders.items():
                    gc.collect()
                    with recorder():
                        least[name][shape] = min(least[name][shape], _cpu(agent, turns, tools))
    return _per_call(framework, least)


def _per_call(framework: str, least: Mapping[str, list[float]]) -> dict[str, float]:
    """What each recorder adds, from the CPU seconds of the three shapes.

    `turn` is one model call with one tool call, and is measured best: telling its two parts apart subtracts
    numbers that are much larger than the difference.
    """
    results: dict[str, float] = {}
    for name, seconds in least.items():
        if name == "none":
            continue
        one, single, several = (
            1e6 * (with_it - without) for with_it, without in zip(seconds, least["none"], strict=True)
        )
        turn = (single - one) / TURNS
        tool = (several - single) / (TURNS * (MORE_TOOLS - 1))
        values = {"turn": turn, "tool_call": tool, "llm_call": turn - tool, "run": one}
        results |= {f"{framework}_{name}_{what}_us": round(value, 1) for what, value in values.items()}
    return results


def _cpu(agent: Run, turns: int, tools: int) -> float:
    start = time.process_time()
    agent(turns, tools)
    get_tracer().flush(30)
    _flush_peer()
    return time.process_time() - start


# --- the model -----------------------------------------------------------------------------------


def respond(request: httpx.Request) -> httpx.Response:
    """Tool calls for as many turns as the user asked for, then text."""
    body = json.loads(request.content)
    turns, tools = map(int, re.search(r"Add them up\. (\d+) (\d+)", request.content.decode()).groups())  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
    done = sum(1 for message in body["messages"] if message["role"] == "assistant")
    message: dict[str, Any] = {"role": "assistant", "content": None if done < turns else "It is eleven."}
    if done < turns:
        arguments = json.dumps({"a": done, "b": 2})
        function = {"name": "add", "arguments": arguments}
        message["tool_calls"] = [
            {"id": f"call_{done}_{i}", "type": "function", "function": function} for i in range(tools)
        ]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if done < turns else "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 6, "total_tokens": 106}
    head = {"id": f"chatcmpl-{done}", "object": "chat.completion", "created": 1, "model": body["model"]}
    return httpx.Response(200, json={**head, "choices": [choice], "usage": usage})


def _openai(url: str, client: Callable[..., Any]) -> dict[str, Any]:
    return {
        "base_url": url,
        "api_key": "k",
        "http_client": client(transport=httpx.MockTransport(respond)),
    }


def _task(turns: int, tools: int) -> str:
    return f"Add them up. {turns} {tools}"


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


# --- the agents ----------------------------------------------------------------------------------


def langchain_agent(url: str) -> Run:
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="m", **_openai(url, httpx.Client))
    agent: Any = create_agent(chat, [add], name="calc", system_prompt=SYSTEM)
    config: Any = {"recursion_limit": 100}
    return lambda turns, tools: agent.invoke({"messages": [("user", _task(turns, tools))]}, config)


def openai_agents_agent(url: str) -> Run:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_trace_processors
    from openai import AsyncOpenAI

    set_trace_processors([])  # not the default one, which sends to OpenAI
    model = OpenAIChatCompletionsModel("m", AsyncOpenAI(**_openai(url, httpx.AsyncClient)))
    agent = Agent("calc", instructions=SYSTEM, tools=[function_tool(add)], model=model)
    loop = asyncio.new_event_loop()
    return lambda turns, tools: loop.run_until_complete(Runner.run(agent, _task(turns, tools), max_turns=100))


def autogen_agent(url: str) -> Run:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import ModelInfo
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info = ModelInfo(
        vision=False, function_calling=True, json_output=True, family="unknown", structured_output=False
    )
    client = OpenAIChatCompletionClient(model="m", model_info=info, **_openai(url, httpx.AsyncClient))
    loop = asyncio.new_event_loop()

    def run(turns: int, tools: int) -> object:
        agent = AssistantAgent("calc", client, tools=[add], system_message=SYSTEM, max_tool_iterations=100)
        return loop.run_until_complete(agent.run(task=_task(turns, tools)))

    return run


def crewai_agent(url: str) -> Run:
    from crewai import LLM, Agent, Crew, Task
    from crewai.tools import tool
    from openai import OpenAI

    summing = tool("add")(add)

    def run(turns: int, tools: int) -> object:
        llm: Any = LLM(model="openai/gpt-4o-mini", base_url=url, api_key="k")
        llm._client = OpenAI(**_openai(url, httpx.Client))  # `client_params` go to its async client too
        agent = Agent(
            role="calc", goal="sums", backstory=SYSTEM, tools=[summing], llm=llm, max_iter=100, verbose=False
        )
        task = Task(description=_task(turns, tools), expected_output="a number", agent=agent)
        return Crew(agents=[agent], tasks=[task], verbose=False).kickoff()

    return run


AGENTS: Final[Mapping[str, Callable[[str], Run]]] = {
    "langchain": langchain_agent,
    "openai_agents": openai_agents_agent,
    "autogen": autogen_agent,
    "crewai": crewai_agent,
}

# --- the recorders -------------------------------------------------------------------------------

_peer: list[Any] = []


def _flush_peer() -> None:
    for provider in _peer:
        provider.force_flush(30_000)


def recorders_of(framework: str, url: str) -> dict[str, Recorder]:
    """Each recorder as a context in which it is at work."""
    recorders: dict[str, Recorder] = {}
    if framework in BARE:
        recorders["bare"] = BARE[framework]
    recorders["light"] = lambda: _ours(framework, url, "light")
    recorders["otel"] = lambda: _ours(framework, url, "otel")
    recorders["openinference"] = _peer_recorder(framework, url)
    return recorders


@contextlib.contextmanager
def _ours(framework: str, url: str, tracer: Any) -> Generator[None]:
    import importlib

    adapter = importlib.import_module(f"agentlightning_{framework}")
    configure(url, tracer=tracer)
    adapter.instrument()
    try:
        yield
    finally:
        adapter.uninstrument()
        configure("")


def _peer_recorder(framework: str, url: str) -> Recorder:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    exporter = OTLPSpanExporter(f"{url}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=65536))
    instrumentor, options = _peer_instrumentor(framework)

    @contextlib.contextmanager
    def recording() -> Generator[None]:
        instrumentor.instrument(tracer_provider=provider, **options)
        _peer.append(provider)
        try:
            yield
        finally:
            _peer.clear()
            instrumentor.uninstrument()

    return recording


def _peer_instrumentor(framework: str) -> tuple[Any, dict[str, Any]]:
    if framework == "langchain":
        from openinference.instrumentation.langchain import LangChainInstrumentor

        return LangChainInstrumentor(), {}
    if framework == "openai_agents":
        from openinference.instrumentation.openai_agents import OpenAIAgentsInstrumentor

        return OpenAIAgentsInstrumentor(), {}
    if framework == "autogen":
        from openinference.instrumentation.autogen_agentchat import AutogenAgentChatInstrumentor

        return AutogenAgentChatInstrumentor(), {}
    from openinference.instrumentation.crewai import CrewAIInstrumentor

    return CrewAIInstrumentor(), {"use_event_listener": True}  # without it, no model call is recorded


@contextlib.contextmanager
def _bare_langchain() -> Generator[None]:
    from langchain_core.tracers.context import register_configure_hook
    from tests.bench.bench_adapters import KeepsValues

    current = _bare_switch
    if not current.registered:
        register_configure_hook(current, inheritable=True, handle_class=KeepsValues)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        current.registered = True
    current.handler = KeepsValues()
    try:
        yield
    finally:
        current.handler = None


class _Switch:
    handler: Any = None
    registered = False

    def get(self) -> Any:
        return self.handler


_bare_switch = _Switch()


@contextlib.contextmanager
def _bare_openai_agents() -> Generator[None]:
    from agents import TracingProcessor, set_trace_processors

    class Keeps(TracingProcessor):
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def on_trace_start(self, trace: Any) -> None:
            self.kept.append(trace)

        def on_trace_end(self, trace: Any) -> None:
            self.kept.append(trace)

        def on_span_start(self, span: Any) -> None:
            self.kept.append(span)

        def on_span_end(self, span: Any) -> None:
            self.kept.append((span, span.span_data))

        def shutdown(self) -> None: ...
        def force_flush(self) -> None: ...

    set_trace_processors([Keeps()])
    try:
        yield
    finally:
        set_trace_processors([])


BARE: Final[Mapping[str, Recorder]] = {"langchain": _bare_langchain, "openai_agents": _bare_openai_agents}

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(measure(sys.argv[1])))
