# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportPrivateUsage=false
# ruff: noqa: I001 (the first import is to come before CrewAI's)
"""CrewAI in the acceptance matrix."""

from __future__ import annotations

import tests.adapters.quiet_crewai  # pyright: ignore[reportUnusedImport]  # noqa: F401

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool
from pydantic import BaseModel
from tests.adapters.acceptance.harness import TEMPERATURE, Case, Expected, Stage, Way
from tests.support.scripted_engine import tool_call

import agentlightning_crewai
from agentlightning import semconv
from agentlightning.context import current_rollout
from agentlightning.tracing import get_tracer
from agentlightning.types import ToolStatus
from agentlightning_crewai import LightningEventListener

DELEGATE = "delegate_work_to_coworker"


class Answer(BaseModel):
    """What the model is to answer with."""

    a: int


@tool("add")
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool("boom")
def boom(x: str) -> str:
    """Always fails."""
    raise RuntimeError(f"tool broke {x}")


@dataclass(frozen=True)
class CrewAgent:
    """An agent or a crew, built when it is run: CrewAI streams where its model is told to."""

    build: Callable[[bool], tuple[Any, dict[str, Any], Any]]
    stage: Stage

    def run(self) -> object:
        runnable, given, llm = self.build(False)
        try:
            return runnable.kickoff(**given)
        finally:
            llm._client.close()

    async def arun(self) -> object:
        return await self._run(stream=False)

    async def astream(self) -> object:
        return await self._run(stream=True)

    async def _run(self, *, stream: bool) -> object:
        listener = LightningEventListener()
        runnable, given, llm = self.build(stream)
        try:
            return await runnable.akickoff(**given)
        except asyncio.CancelledError:
            active = current_rollout()
            await self._left_over(active.rollout_id if active is not None else listener.rollout_id or "")
            raise
        finally:
            llm._client.close()

    async def _left_over(self, rollout_id: str) -> None:
        """Until the request has ended that CrewAI's thread goes on with, which the server then records."""
        assert get_tracer().flush(10)
        async with asyncio.timeout(20):
            while not any(s.scope == semconv.SCOPE_GATEWAY for s in self.stage.client.spans(rollout_id)):
                await asyncio.sleep(0.05)


@dataclass(frozen=True)
class CrewAIDriver:
    name: str = "crewai"
    readme: Path = Path("adapters/crewai/README.md")
    skips: Mapping[tuple[Way | None, Case | None], str] = field(default_factory=dict)
    scripts: Mapping[Case, Callable[[], list[Any]]] = field(
        default_factory=lambda: {
            Case.NESTED: lambda: [
                tool_call(DELEGATE, task="ask", context="c", coworker="helper"),
                "inner says",
                "outer says",
            ],
            # CrewAI hands over between the tasks of a crew, not by a tool.
            Case.HANDOFF: lambda: ["a says", "b says"],
        }
    )
    expected: Mapping[Case, Expected] = field(
        default_factory=lambda: {
            Case.NESTED: Expected(
                ["outer", "helper", "outer"], [(DELEGATE, ToolStatus.OK)], runs=("crew", "outer", "helper")
            ),
            Case.HANDOFF: Expected(["a", "b"], runs=("crew", "a", "b")),
        }
    )

    def instrument(self) -> None:
        agentlightning_crewai.instrument()

    def uninstrument(self) -> None:
        agentlightning_crewai.uninstrument()

    def agent(self, case: Case, stage: Stage, model: str) -> CrewAgent:
        def build(stream: bool) -> tuple[Any, dict[str, Any], Any]:
            llm = LLM(
                model=model,
                provider="openai",
                temperature=TEMPERATURE,
                max_retries=2 if case is Case.RETRIED else 0,
                timeout=0.5 if case is Case.CANCELLED else None,  # of the request that is left over
                stream=stream,
                **stage.openai,
            )
            return (*_runnable(case, llm), llm)

        return CrewAgent(build, stage)


def _runnable(case: Case, llm: LLM) -> tuple[Any, dict[str, Any]]:
    def agent(role: str, **settings: Any) -> Agent:
        return Agent(role=role, goal="g", backstory="b", llm=llm, max_retry_limit=0, **settings)

    if case is Case.NESTED:
        outer, helper = agent("outer", allow_delegation=True), agent("helper")
        task = Task(description="go", expected_output="x", agent=outer)
        return Crew(agents=[outer, helper], tasks=[task]), {}
    if case is Case.HANDOFF:
        pair = [agent("a"), agent("b")]
        tasks = [Task(description="go", expected_output="x", agent=worker) for worker in pair]
        return Crew(agents=[*pair], tasks=tasks), {}
    if case is Case.STRUCTURED:
        return agent("calc"), {"messages": "go", "response_format": Answer}
    return agent("calc", tools=[add, boom]), {"messages": "go"}


DRIVER = CrewAIDriver()
