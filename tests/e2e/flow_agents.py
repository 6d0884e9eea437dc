"""A flow of three agents in LangGraph: a writer drafts, a checker judges, a rewriter answers.

Ordinary code that knows nothing of the server but its environment. Each agent asks for a model by a name of
its own; `checked_by` of the task names the checker's.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
from __future__ import annotations

from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

import agentlightning_langchain
from agentlightning.runner import RolloutContext

agentlightning_langchain.instrument()


class Draft(TypedDict, total=False):
    """What the agents hand on."""

    question: str
    draft: str
    verdict: str
    answer: str


def flow(writer: str, checker: str, rewriter: str, *, stream: bool = False) -> Any:
    """The graph, its agents asking for these models."""

    def model(name: str) -> ChatOpenAI:
        return ChatOpenAI(model=name, max_tokens=8, max_retries=0, streaming=stream)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    async def write(state: Draft) -> Draft:
        said = await model(writer).ainvoke(state.get("question", ""))
        return {"draft": said.text}

    async def check(state: Draft) -> Draft:
        said = await model(checker).ainvoke(f"Good? {state.get('draft')}")
        return {"verdict": said.text}

    async def rewrite(state: Draft) -> Draft:
        said = await model(rewriter).ainvoke(f"{state.get('draft')} {state.get('verdict')}")
        return {"answer": said.text}

    graph = StateGraph(Draft)
    graph.add_node("writer", write)
    graph.add_node("checker", check)
    graph.add_node("rewriter", rewrite)
    graph.add_edge(START, "writer")
    graph.add_edge("writer", "checker")
    graph.add_edge("checker", "rewriter")
    graph.add_edge("rewriter", END)
    return graph.compile()


async def one_policy(task: dict[str, Any], ctx: RolloutContext) -> float:
    """All three agents ask for the model that the runner was told."""
    return await _run(flow(ctx.model, ctx.model, ctx.model), task)


async def a_policy_each(task: dict[str, Any], ctx: RolloutContext) -> float:
    """Writer and rewriter have a policy each; the checker has whatever model the task names."""
    checker = str(task.get("checked_by", "checker"))
    return await _run(flow("writer", checker, "rewriter", stream=bool(task.get("stream"))), task)


async def _run(graph: Any, task: dict[str, Any]) -> float:
    state = await graph.ainvoke({"question": task["question"]})
    return letters(state["draft"]) + letters(state["answer"])


def letters(text: str) -> float:
    """A reward that differs from answer to answer, so that there is always something to learn."""
    return sum(map(ord, text)) % 17 / 17
