"""The OpenAI Agents SDK in the acceptance matrix."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents import Agent, ModelSettings, OpenAIProvider, RunConfig, Runner, function_tool
from openai import AsyncOpenAI
from pydantic import BaseModel
from tests.adapters.acceptance.harness import TEMPERATURE, Case, Expected, Stage, Way
from tests.support.scripted_engine import tool_call

import agentlightning_openai_agents
from agentlightning.types import ToolStatus


class Answer(BaseModel):
    """What the model is to answer with."""

    a: int


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@function_tool
def boom(x: str) -> str:
    """Always fails."""
    raise RuntimeError(f"tool broke {x}")


@contextmanager
def own_loop() -> Generator[asyncio.AbstractEventLoop]:
    """A loop for `run_sync`, which would else leave this thread's default one open and without generators."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@dataclass(frozen=True)
class SDKAgent:
    """An agent with a client of its own, which belongs to the event loop. The API is left to the SDK."""

    start: Agent[None]
    client: Callable[[], AsyncOpenAI]

    def run(self) -> object:
        with own_loop() as loop:
            client = self.client()
            try:
                return Runner.run_sync(self.start, "go", run_config=_asking(client))
            finally:
                loop.run_until_complete(client.close())

    async def arun(self) -> object:
        async with self.client() as client:
            return await Runner.run(self.start, "go", run_config=_asking(client))

    async def astream(self) -> object:
        async with self.client() as client:
            result = Runner.run_streamed(self.start, "go", run_config=_asking(client))
            return [event async for event in result.stream_events()]


def _asking(client: AsyncOpenAI) -> RunConfig:
    return RunConfig(model_provider=OpenAIProvider(openai_client=client))


@dataclass(frozen=True)
class OpenAIAgentsDriver:
    name: str = "openai_agents"
    readme: Path = Path("adapters/openai_agents/README.md")
    skips: Mapping[tuple[Way | None, Case | None], str] = field(
        default_factory=dict[tuple[Way | None, Case | None], str]
    )
    scripts: Mapping[Case, Callable[[], list[Any]]] = field(
        default_factory=lambda: {
            # An agent as a tool takes "input".
            Case.NESTED: lambda: [tool_call("helper", input="ask"), "inner says", "outer says"],
        }
    )
    expected: Mapping[Case, Expected] = field(
        default_factory=lambda: {
            # By default the SDK lets a call of an unknown tool end the run.
            Case.UNKNOWN_TOOL: Expected(["calc"], [("nope", ToolStatus.UNKNOWN_TOOL)], raises=True),
        }
    )

    def instrument(self) -> None:
        agentlightning_openai_agents.instrument()

    def uninstrument(self) -> None:
        agentlightning_openai_agents.uninstrument()

    def agent(self, case: Case, stage: Stage, model: str) -> SDKAgent:
        def client() -> AsyncOpenAI:
            return AsyncOpenAI(max_retries=2 if case is Case.RETRIED else 0, **stage.openai)

        return SDKAgent(_agent(case, model), client)


def _agent(case: Case, model: str) -> Agent[None]:
    def agent(name: str, **settings: Any) -> Agent[None]:
        return Agent(name, model=model, model_settings=ModelSettings(temperature=TEMPERATURE), **settings)

    if case is Case.NESTED:
        helper = agent("helper").as_tool("helper", "Ask another agent.")
        return agent("outer", tools=[helper])
    if case is Case.HANDOFF:
        return agent("a", handoffs=[agent("b")])
    if case is Case.STRUCTURED:
        return agent("calc", output_type=Answer)
    return agent("calc", tools=[add, boom])


DRIVER = OpenAIAgentsDriver()
