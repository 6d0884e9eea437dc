"""Agents of the end-to-end tests: ordinary code that knows nothing of the server but its environment."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import openai
from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient

import agentlightning_autogen
from agentlightning.runner import RolloutContext

agentlightning_autogen.instrument()

INFO = ModelInfo(
    vision=False, function_calling=True, json_output=False, family="unknown", structured_output=False
)


def lookup(word: str) -> str:
    """Look a word up."""
    return f"{word} is a word"


async def two_turns(task: dict[str, Any], ctx: RolloutContext) -> float:
    """An AutoGen assistant that is asked twice in one conversation, streaming or not."""
    client = OpenAIChatCompletionClient(model=ctx.model, model_info=INFO, max_tokens=24)
    agent = AssistantAgent(
        "assistant", model_client=client, tools=[lookup], model_client_stream=bool(task["stream"])
    )
    await agent.run(task=task["question"])
    await agent.run(task="And again?")
    return float(task["reward"])


async def say_e(task: str, ctx: RolloutContext) -> float:
    """Reward: the share of the letter e in what the policy says."""
    async with openai.AsyncOpenAI() as client:
        answer = await client.chat.completions.create(
            model=ctx.model, messages=[{"role": "user", "content": task}], max_tokens=12
        )
    text = answer.choices[0].message.content or ""
    return text.count("e") / 12


async def hang_once(task: str, ctx: RolloutContext) -> float:
    """Hangs at its first attempt, in a way that no exception reaches."""
    if ctx.attempt.number == 1:
        Path(task).write_text(str(os.getpid()))
        while True:
            time.sleep(3600)
    await asyncio.sleep(0)
    return 1.0


async def raises(task: str) -> float:
    """Raises on every second task."""
    if task.endswith("bad"):
        raise RuntimeError("the tool server is down")
    return 1.0
