# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
"""AutoGen in the acceptance matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import TextMessageTermination
from autogen_agentchat.teams import Swarm
from autogen_agentchat.tools import AgentTool
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel
from tests.adapters.acceptance.harness import TEMPERATURE, Case, Expected, Stage, Way

import agentlightning_autogen
from agentlightning.types import ToolStatus

INFO = ModelInfo(
    vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True
)


class Answer(BaseModel):
    """What the model is to answer with."""

    a: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def boom(x: str) -> str:
    """Always fails."""
    raise RuntimeError(f"tool broke {x}")


@dataclass(frozen=True)
class AutoGenAgent:
    """An agent or team, built when it is run, for its client belongs to the event loop."""

    build: Callable[[bool], tuple[Any, OpenAIChatCompletionClient]]

    def run(self) -> object:
        raise NotImplementedError

    async def arun(self) -> object:
        runnable, client = self.build(False)
        try:
            return await runnable.run(task="go")
        finally:
            await client.close()

    async def astream(self) -> object:
        runnable, client = self.build(True)
        try:
            return [item async for item in runnable.run_stream(task="go")]
        finally:
            await client.close()


@dataclass(frozen=True)
class AutoGenDriver:
    name: str = "autogen"
    readme: Path = Path("adapters/autogen/README.md")
    skips: Mapping[tuple[Way | None, Case | None], str] = field(
        default_factory=lambda: {(Way.SYNC, None): "AutoGen has no synchronous API"}
    )
    scripts: Mapping[Case, Callable[[], list[Any]]] = field(default_factory=dict)
    expected: Mapping[Case, Expected] = field(
        default_factory=lambda: {
            # Handing over takes a team, which is a run of its own.
            Case.HANDOFF: Expected(["a", "b"], [("transfer_to_b", ToolStatus.OK)], runs=("Swarm", "a", "b"))
        }
    )

    def instrument(self) -> None:
        agentlightning_autogen.instrument()

    def uninstrument(self) -> None:
        agentlightning_autogen.uninstrument()

    def agent(self, case: Case, stage: Stage, model: str) -> AutoGenAgent:
        def build(stream: bool) -> tuple[Any, OpenAIChatCompletionClient]:
            client = OpenAIChatCompletionClient(
                model=model,
                model_info=INFO,
                temperature=TEMPERATURE,
                max_retries=2 if case is Case.RETRIED else 0,
                **stage.openai,
            )
            return _runnable(case, client, stream), client

        return AutoGenAgent(build)


def _runnable(case: Case, client: OpenAIChatCompletionClient, stream: bool) -> Any:
    def agent(name: str, **settings: Any) -> AssistantAgent:
        return AssistantAgent(
            name, client, description=name, model_client_stream=stream, max_tool_iterations=3, **settings
        )

    if case is Case.NESTED:
        return agent("outer", tools=[AgentTool(agent("helper"))])
    if case is Case.HANDOFF:
        members = [agent("a", handoffs=["b"]), agent("b")]
        return Swarm([*members], termination_condition=TextMessageTermination("b"))
    if case is Case.STRUCTURED:
        return agent("calc", output_content_type=Answer)
    return agent("calc", tools=[add, boom])


DRIVER = AutoGenDriver()
