"""Agents of the tests on VeRL: ordinary LangChain code that knows nothing of VeRL."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

import agentlightning_langchain
from agentlightning import RolloutContext

agentlightning_langchain.instrument()

TOKENS = 16


@tool
def meaning(letter: Literal["a", "e"]) -> str:
    """Look up a letter."""
    return f"{letter} is a letter"


async def two_turns(task: dict[str, Any], ctx: RolloutContext) -> float:
    """Calls a tool, reads its result, answers; the reward is its share of letters and digits."""
    model: Any = ChatOpenAI(model=ctx.model, temperature=1.0, max_completion_tokens=96)
    messages: list[AnyMessage] = [HumanMessage(task["question"])]
    asked: Any = await model.bind_tools([meaning], tool_choice="meaning", strict=True).ainvoke(messages)
    looked_up: Any = await meaning.ainvoke(asked.tool_calls[0])
    answering: Any = ChatOpenAI(model=ctx.model, temperature=1.0, max_completion_tokens=TOKENS)
    answer: Any = await answering.bind_tools([meaning], strict=True).ainvoke([*messages, asked, looked_up])
    return sum(c.isascii() and c.isalnum() for c in str(answer.content)) / TOKENS
