"""An ordinary LangGraph agent that answers questions about a database in SQL.

    writer -> execute -> checker -> (done, or) rewriter -> execute -> checker -> ...

Ours are the two lines marked below: the adapter, which records what the agents do, and `solve`, which runs
one task for training and says how good the result was. Everything else is the agent as its author wrote it.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

import agentlightning_langchain
from agentlightning import RolloutContext
from examples.spider_sql.data import database
from examples.spider_sql.prompts import to_check, to_rewrite, to_write
from examples.spider_sql.reward import execution_match
from examples.spider_sql.sandbox import run

agentlightning_langchain.instrument()  # ours: the adapter

MAX_TURNS = 3  # queries at most: one written, two rewritten
SHOWN_ROWS = 3


class State(TypedDict):
    """What the agents hand on."""

    question: str
    schema: str
    database: Path
    query: str
    result: str
    verdict: str
    turns: int


def make_agent(model: str = "policy", *, checker: str | None = None) -> Any:
    """The graph. Its clients find the server in OPENAI_BASE_URL and OPENAI_API_KEY, as always."""

    def client(name: str, tokens: int) -> ChatOpenAI:
        return ChatOpenAI(model=name, max_tokens=tokens, temperature=1.0, stop_sequences=["\n"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    writes, checks = client(model, 48), client(checker or model, 4)

    async def writer(state: State) -> dict[str, Any]:
        said = await writes.ainvoke(to_write(state["schema"], state["question"]))
        return {"query": said.text.strip(), "turns": 1}

    async def execute(state: State) -> dict[str, Any]:
        return {"result": await asyncio.to_thread(run, state["query"], state["database"], limit=SHOWN_ROWS)}

    async def check_it(state: State) -> dict[str, Any]:
        said = await checks.ainvoke(to_check(state["question"], state["query"], state["result"]))
        return {"verdict": said.text.strip().lower()}

    async def rewriter(state: State) -> dict[str, Any]:
        prompt = to_rewrite(state["schema"], state["question"], state["query"], state["result"])
        said = await writes.ainvoke(prompt)
        return {"query": said.text.strip(), "turns": state["turns"] + 1}

    def after_check(state: State) -> str:
        return END if state["verdict"].startswith("yes") or state["turns"] >= MAX_TURNS else "rewriter"

    graph = StateGraph(State)
    for name, node in (
        ("writer", writer),
        ("execute", execute),
        ("checker", check_it),
        ("rewriter", rewriter),
    ):
        graph.add_node(name, node)
    graph.add_edge(START, "writer")
    graph.add_edge("writer", "execute")
    graph.add_edge("execute", "checker")
    graph.add_conditional_edges("checker", after_check, ["rewriter", END])
    graph.add_edge("rewriter", "execute")
    return graph.compile()


async def solve(task: dict[str, Any], ctx: RolloutContext) -> float:  # ours: one task, and its reward
    """Answer {"question", "query", "database", "schema"}; the reward is 1 when the last query is right."""
    file = database(task["database"])
    asked = {"question": task["question"], "schema": task["schema"], "database": file}
    state = await make_agent(ctx.model).ainvoke(asked)
    right = await asyncio.to_thread(execution_match, state["query"], task["query"], file)
    return 1.0 if right else 0.0
