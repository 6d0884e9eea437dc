# pyright: basic, reportMissingImports=false
"""Agents with other people's instrumentations, each run in a process of its own as its user would run it.

    OPENAI_BASE_URL=... OTEL_EXPORTER_OTLP_ENDPOINT=... python -m tests.foreign.applications NAME

The model decides what the agent does (`add` twice, the second time with arguments that do not validate), so
every application makes three model calls and two tool calls. But for the one that has our adapter as well,
nothing here knows agentlightning: an instrumentation sends its spans with OpenTelemetry's own exporter, set
up by OpenTelemetry's own variables.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

MODEL = os.environ.get("MODEL", "m")
QUESTION = "What is 1 + 2?"
SYSTEM = "You add numbers."
STREAM = bool(os.environ.get("STREAM"))
SCHEMA = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


# --- agents --------------------------------------------------------------------------------------


def openai_loop() -> None:
    """No framework: the OpenAI client and a loop, under a span of the application's own."""
    from openai import OpenAI

    client = OpenAI()
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    with trace.get_tracer("my-application").start_as_current_span("answer a question"):
        while True:
            message = _ask(client, messages)
            messages.append(message)
            if not message.get("tool_calls"):
                return
            for call in message["tool_calls"]:
                try:
                    result = str(add(**json.loads(call["function"]["arguments"])))
                except TypeError as error:
                    result = f"Error: {error}"
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


def _ask(client: Any, messages: list[Any]) -> dict[str, Any]:
    asked = {"model": MODEL, "messages": messages, "tools": [SCHEMA], "temperature": 0.5}
    if not STREAM:
        return client.chat.completions.create(**asked).choices[0].message.model_dump(exclude_none=True)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message.model_dump(exclude_none=True)
    message.pop("parsed", None)
    for call in message.get("tool_calls", []):
        call.pop("index", None)
        call["function"].pop("parsed_arguments", None)
    return message


def langchain_agent() -> None:
    from langchain.agents import create_agent
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, temperature=0.5)
    agent = create_agent(model, [tool(add)], system_prompt=SYSTEM, name="calc")
    asked: Any = {"messages": [("user", QUESTION)]}
    if STREAM:
        for _ in agent.stream(asked, stream_mode="messages"):
            pass
    else:
        agent.invoke(asked)


def openai_agents_agent() -> None:
    from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_api

    set_default_openai_api("chat_completions")
    settings = ModelSettings(temperature=0.5, include_usage=True)
    agent = Agent(
        "calc", instructions=SYSTEM, model=MODEL, tools=[function_tool(add)], model_settings=settings
    )

    async def run() -> None:
        if not STREAM:
            await Runner.run(agent, QUESTION)
            return
        async for _ in Runner.run_streamed(agent, QUESTION).stream_events():
            pass

    asyncio.run(run())


def autogen_agent() -> None:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import ModelInfo
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info = ModelInfo(
        vision=False, function_calling=True, json_output=True, family="unknown", structured_output=False
    )

    async def run() -> None:
        client = OpenAIChatCompletionClient(model=MODEL, model_info=info, temperature=0.5)
        agent = AssistantAgent(
            "calc",
            client,
            tools=[add],
            system_message=SYSTEM,
            max_tool_iterations=5,
            model_client_stream=STREAM,
        )
        await agent.run(task=QUESTION)
        await client.close()

    asyncio.run(run())


def crewai_crew() -> None:
    from crewai import LLM, Agent, Crew, Task
    from crewai.tools import tool

    llm = LLM(model=f"openai/{MODEL}", base_url=os.environ["OPENAI_BASE_URL"], temperature=0.5, stream=STREAM)
    agent = Agent(role="calc", goal="add", backstory=SYSTEM, llm=llm, tools=[tool(add)])
    Crew(
        agents=[agent], tasks=[Task(description=QUESTION, expected_output="a number", agent=agent)]
    ).kickoff()


def pydantic_ai_agent(**settings: Any) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.instrumented import InstrumentationSettings
    from pydantic_ai.models.openai import OpenAIChatModel

    Agent.instrument_all(InstrumentationSettings(**settings))
    agent = Agent(
        OpenAIChatModel(MODEL),
        system_prompt=SYSTEM,
        tools=[add],
        name="calc",
        model_settings={"temperature": 0.5},
    )

    async def run() -> None:
        if not STREAM:
            await agent.run(QUESTION)
            return
        async with agent.run_stream(QUESTION) as result:
            await result.get_output()

    asyncio.run(run())


# --- instrumentations ----------------------------------------------------------------------------


def openinference(*names: str, **options: Any) -> None:
    for name in names:
        _instrument(f"openinference.instrumentation.{name}", **options)


def genai(*names: str) -> None:
    os.environ["OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"] = "SPAN_ONLY"
    os.environ["OTEL_SEMCONV_STABILITY_OPT_IN"] = "gen_ai_latest_experimental"
    for name in names:
        _instrument(f"opentelemetry.instrumentation.{name}")


def traceloop(*names: str) -> None:
    os.environ["TRACELOOP_METRICS_ENABLED"] = "false"
    for name in names:
        _instrument(f"opentelemetry.instrumentation.{name}")


def beside_ours() -> None:
    """Our adapter, with a foreign instrumentation that sees the same."""
    import agentlightning_langchain

    agentlightning_langchain.instrument()
    openinference("langchain", "openai")


def _instrument(module: str, **options: Any) -> None:
    names = [name for name in vars(import_module(module)) if name.endswith("Instrumentor")]
    own = next(name for name in names if name != "BaseInstrumentor" and not name.startswith("_"))
    getattr(import_module(module), own)().instrument(**options)


def _and(*steps: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


APPLICATIONS: dict[str, Callable[[], None]] = {
    "openinference_openai": _and(lambda: openinference("openai"), openai_loop),
    "openinference_langchain": _and(lambda: openinference("langchain"), langchain_agent),
    "openinference_langchain_and_openai": _and(lambda: openinference("langchain", "openai"), langchain_agent),
    "openinference_openai_agents": _and(lambda: openinference("openai_agents"), openai_agents_agent),
    "openinference_autogen": _and(lambda: openinference("autogen_agentchat"), autogen_agent),
    "openinference_crewai": _and(lambda: openinference("crewai", use_event_listener=True), crewai_crew),
    "openinference_crewai_and_openai": _and(lambda: openinference("crewai", "openai"), crewai_crew),
    "genai_openai": _and(lambda: genai("genai.openai"), openai_loop),
    "genai_openai_v2": _and(lambda: genai("openai_v2"), openai_loop),
    "genai_langchain": _and(lambda: genai("genai.langchain"), langchain_agent),
    "genai_openai_agents": _and(lambda: genai("genai.openai_agents", "genai.openai"), openai_agents_agent),
    "genai_autogen": _and(lambda: genai("genai.openai"), autogen_agent),
    "traceloop_openai": _and(lambda: traceloop("openai"), openai_loop),
    "traceloop_langchain": _and(lambda: traceloop("langchain"), langchain_agent),
    "traceloop_openai_agents": _and(lambda: traceloop("openai_agents"), openai_agents_agent),
    "traceloop_crewai": _and(lambda: traceloop("crewai", "openai"), crewai_crew),
    "pydantic_ai": pydantic_ai_agent,
    "pydantic_ai_1_events": lambda: pydantic_ai_agent(version=1, event_mode="attributes"),
    "pydantic_ai_2": lambda: pydantic_ai_agent(version=2),
    "pydantic_ai_and_openai": _and(lambda: genai("genai.openai"), pydantic_ai_agent),
    "openinference_langchain_beside_ours": _and(beside_ours, langchain_agent),
    "langchain_and_httpx": _and(
        lambda: openinference("langchain"),
        lambda: _instrument("opentelemetry.instrumentation.httpx"),
        langchain_agent,
    ),
    "openai_and_httpx": _and(
        lambda: genai("genai.openai"), lambda: _instrument("opentelemetry.instrumentation.httpx"), openai_loop
    ),
}


def main() -> None:
    os.environ.setdefault("OPENAI_API_KEY", "none")
    os.environ.update(
        OPENAI_AGENTS_DISABLE_TRACING="", CREWAI_TRACING_ENABLED="false", CREWAI_DISABLE_TELEMETRY="true"
    )
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    APPLICATIONS[sys.argv[1]]()
    provider.shutdown()


if __name__ == "__main__":
    main()
