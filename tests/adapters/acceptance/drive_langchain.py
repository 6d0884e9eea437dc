# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false
"""LangChain and LangGraph in the acceptance matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain.tools import ToolRuntime, tool
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command
from pydantic import BaseModel
from tests.adapters.acceptance.harness import TEMPERATURE, Case, Expected, Stage, Way

import agentlightning_langchain
from agentlightning.types import ToolStatus

GO: Any = {"messages": [("user", "go")]}


class Answer(BaseModel):
    """What the model is to answer with."""

    a: int


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def boom(x: str) -> str:
    """Always fails."""
    raise RuntimeError(f"tool broke {x}")


@dataclass(frozen=True)
class GraphAgent:
    """A compiled graph."""

    graph: Any

    def run(self) -> object:
        return self.graph.invoke(GO)

    async def arun(self) -> object:
        return await self.graph.ainvoke(GO)

    async def astream(self) -> object:
        return [part async for part in self.graph.astream(GO, stream_mode="messages")]


@dataclass(frozen=True)
class LangChainDriver:
    name: str = "langchain"
    readme: Path = Path("adapters/langchain/README.md")
    skips: Mapping[tuple[Way | None, Case | None], str] = field(default_factory=dict)
    scripts: Mapping[Case, Callable[[], list[Any]]] = field(default_factory=dict)
    expected: Mapping[Case, Expected] = field(
        default_factory=lambda: {
            # create_agent lets a tool's exception end the run.
            Case.TOOL_RAISES: Expected(["calc"], [("boom", ToolStatus.RAISED)], raises=True),
            # The graph of two agents is itself one.
            Case.HANDOFF: Expected(["a", "b"], [("transfer_to_b", ToolStatus.OK)], runs=("team", "a", "b")),
        }
    )

    def instrument(self) -> None:
        agentlightning_langchain.instrument()

    def uninstrument(self) -> None:
        agentlightning_langchain.uninstrument()

    def agent(self, case: Case, stage: Stage, model: str) -> GraphAgent:
        chat = ChatOpenAI(
            model=model,
            temperature=TEMPERATURE,
            max_retries=2 if case is Case.RETRIED else 0,
            **stage.openai,
        )
        if case is Case.NESTED:
            return GraphAgent(_nested(chat))
        if case is Case.HANDOFF:
            return GraphAgent(_handoff(chat))
        if case is Case.STRUCTURED:
            return GraphAgent(create_agent(chat, name="calc", response_format=ProviderStrategy(Answer)))
        return GraphAgent(create_agent(chat, [add, boom], name="calc"))


def _nested(chat: ChatOpenAI) -> Any:
    inner: Any = create_agent(chat, name="helper")

    @tool("helper")
    def ask_helper(task: str) -> str:
        """Ask another agent."""
        answer = inner.invoke({"messages": [("user", task)]})
        return str(answer["messages"][-1].content)

    return create_agent(chat, [ask_helper], name="outer")


def _handoff(chat: ChatOpenAI) -> Any:
    @tool
    def transfer_to_b(runtime: ToolRuntime) -> Command[Any]:
        """Hand over to b."""
        done = ToolMessage("transferred", tool_call_id=runtime.tool_call_id)
        messages = [*runtime.state["messages"], done]
        return Command(goto="b", update={"messages": messages}, graph=Command.PARENT)

    graph = StateGraph(MessagesState)
    graph.add_node("a", create_agent(chat, [transfer_to_b], name="a"), destinations=("b",))
    graph.add_node("b", create_agent(chat, name="b"))
    graph.add_edge(START, "a")
    return graph.compile(name="team")


DRIVER = LangChainDriver()
