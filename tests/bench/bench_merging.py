# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
"""What continuing recorded ids brings: calls that share a row of the batch, and its tokens, with and without.

Real agents of AutoGen and LangGraph hold conversations of two questions with tool calls, over HTTP, with the
default model's tokenizer and chat template. What the model says is scripted, in three ways in which models
write a call: as the gateway itself writes it back, on lines of its own as Hermes and Qwen do, and after a
sentence. An answer that is sampled is often not tokenised as its text would be (27 % of the default model's
chat answers); that share of the scripted answers is split otherwise too. "Rendered" is the gateway with
`continue_calls` off: every prompt is the chat template's rendering of the messages, as other gateways do it.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from tests.support.scripted_engine import ScriptedEngine, tool_call
from tests.support.spans import attempt, rollout

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.reading import read_episode
from agentlightning.types import Batch, Episode
from agentlightning_server.engines.base import Engine
from agentlightning_server.engines.embedded import EmbeddedEngine
from agentlightning_server.gateway import GatewaySettings
from agentlightning_server.settings import Settings
from agentlightning_server.training.local import LocalServer, local_server

MODEL: Final = "scripted"
EPISODES: Final = 8
CALLS: Final = (3, 2)  # tool calls before the answer to each question
SPLIT_OTHERWISE: Final = 0.27
Agent = Callable[[str, str], Coroutine[Any, Any, None]]
"""Holds one conversation with the model at a base URL, with a key."""
INFO: Final = ModelInfo(
    vision=False, function_calling=True, json_output=True, family="unknown", structured_output=False
)
QUESTIONS: Final = ("What do two and three and four and five make?", "And with six more, less one?")
STYLES: Final[Mapping[str, Callable[[str], str]]] = {
    "as_written_back": lambda call: call,
    "on_lines": lambda call: call.replace("<tool_call>", "<tool_call>\n").replace(
        "</tool_call>", "\n</tool_call>"
    ),
    "after_a_sentence": lambda call: f"I will add these two numbers first.\n{call}",
}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class SamplingEngine(ScriptedEngine):
    """Says its lines in tokens as sampling gives them: not always those in which the text would be encoded.

    The engine that it takes the tokenizer from stays open when a server before it ends.
    """

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self._random = random.Random(0)

    def close(self) -> None: ...

    def encode(self, text: str) -> list[int]:
        tokens = super().encode(text)
        if self._random.random() >= SPLIT_OTHERWISE:
            return tokens
        texts = [self.tokenizer.decode([token]) for token in tokens]
        at = self._random.choice([i for i, piece in enumerate(texts) if len(piece) > 3 and piece.isascii()])
        middle = len(texts[at]) // 2
        halves = [
            super(SamplingEngine, self).encode(part) for part in (texts[at][:middle], texts[at][middle:])
        ]
        return [*tokens[:at], *halves[0], *halves[1], *tokens[at + 1 :]]


def run() -> dict[str, float]:
    """Calls a row, and how many tokens the batch has without continuation for each with it."""
    inner = EmbeddedEngine()
    results: dict[str, float] = {}
    try:
        for name, agent in (("autogen", autogen), ("langgraph", langgraph)):
            for style in STYLES:
                continued, rendered = (measured(inner, agent, style, continued=c) for c in (True, False))
                assert continued.transitions == rendered.transitions == EPISODES * (sum(CALLS) + len(CALLS))
                results |= {
                    f"{name}_{style}_calls_a_row_continued": continued.transitions / continued.rows,
                    f"{name}_{style}_calls_a_row_rendered": rendered.transitions / rendered.rows,
                    f"{name}_{style}_tokens_rendered_over_continued": rendered.tokens / continued.tokens,
                    f"{name}_{style}_tokens_unmerged_over_continued": continued.unmerged_tokens
                    / continued.tokens,
                }
    finally:
        inner.close()
    return results


def measured(inner: Engine, agent: Agent, style: str, *, continued: bool) -> Batch:
    """The batch of all episodes of an agent whose model writes calls in this style."""
    engine = SamplingEngine(inner)
    gateway = GatewaySettings(continue_calls=continued)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(port=0, database=Path(folder) / "store.db")
        with local_server(cast("Engine", engine), settings, gateway) as server:
            for number in range(EPISODES):
                engine.script[MODEL].extend(lines(STYLES[style], number))
                asyncio.run(agent(f"{server.url}/rollouts/{number}/attempts/{number}-1/v1", server.key))
            episodes = [episode_of(server, str(number)) for number in range(EPISODES)]
    return make_batch(episodes, LearningSettings(policy=MODEL))


def lines(style: Callable[[str], str], number: int) -> list[str]:
    """What the model says in one conversation."""
    said: list[str] = []
    for calls in CALLS:
        said += [style(tool_call("add", a=number + i, b=i)) for i in range(calls)]
        said.append(f"Together they make {number}, I believe.")
    return said


async def autogen(url: str, key: str) -> None:
    """Both questions, asked of an AutoGen assistant."""
    client = OpenAIChatCompletionClient(model=MODEL, model_info=INFO, base_url=url, api_key=key)
    agent = AssistantAgent("calc", client, tools=[add], max_tool_iterations=max(CALLS) + 1)
    for question in QUESTIONS:
        await agent.run(task=question)
    await client.close()


async def langgraph(url: str, key: str) -> None:
    """Both questions, asked of a LangGraph agent."""
    agent = create_agent(ChatOpenAI(model=MODEL, base_url=url, api_key=SecretStr(key)), [add])
    messages: list[Any] = []
    for question in QUESTIONS:
        asked: Any = {"messages": [*messages, ("user", question)]}
        messages = (await agent.ainvoke(asked))["messages"]


def episode_of(server: LocalServer, rollout_id: str) -> Episode:
    """A finished conversation, with a reward so that it counts."""
    of = {"id": rollout_id, "group_id": rollout_id}
    spans = server.store.spans(rollout_id)
    tried = attempt(id=f"{rollout_id}-1", rollout_id=rollout_id)
    return replace(read_episode(rollout(**of), tried, spans), final_reward=1.0)
