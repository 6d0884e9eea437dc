# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false
"""Both adapters against the real server: an agent that runs by itself, and what can be learned from it."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from tests.support.scripted_engine import ScriptedEngine, tool_call
from tests.support.serving import serving, tiny_engine

import agentlightning_autogen
import agentlightning_langchain
from agentlightning.client import LightningClient
from agentlightning.reading.episodes import read_episode
from agentlightning.tracing import configure, get_tracer, trace
from agentlightning.types import Episode, ToolStatus
from agentlightning_langchain import LightningCallbackHandler

CALL = tool_call("add", a=1, b=2)
UNKNOWN = tool_call("nope")
BROKEN = tool_call("add", a="z")
INFO = ModelInfo(
    vision=False, function_calling=True, json_output=True, family="unknown", structured_output=False
)


class Stage:
    """A server whose model is scripted, and this process as its agent."""

    def __init__(self, engine: ScriptedEngine, url: str, key: str) -> None:
        self.engine = engine
        self.client = LightningClient(url, key)
        self.openai: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": key}

    def episode(self, rollout_id: str) -> Episode:
        assert get_tracer().flush(10)
        assert get_tracer().dropped == 0
        rollout, (attempt,) = self.client.rollout(rollout_id)
        return read_episode(rollout, attempt, self.client.spans(rollout_id))

    def assert_exact(self, episode: Episode) -> None:
        """What would be trained on is what the engine sampled, in that order."""
        assert not episode.untrainable
        assert [
            (t.prompt_ids.tolist(), t.response_ids.tolist(), [round(float(p), 4) for p in t.logprobs])
            for t in episode.transitions
        ] == [(p, r, [round(lp, 4) for lp in lps]) for p, r, lps in self.engine.sampled["policy"]]


@contextmanager
def staged(folder: Path, tracer: Any) -> Generator[Stage]:
    engine = ScriptedEngine(tiny_engine(folder, context_length=4096))
    with serving(engine, folder) as server:  # type: ignore[arg-type]
        configure(server.url, server.key, tracer)
        stage = Stage(engine, server.url, server.key)
        try:
            yield stage
        finally:
            configure("")
            stage.client.close()


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture(params=["light", "otel"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    agentlightning_autogen.instrument()
    with staged(tmp_path, request.param) as running:
        yield running
    agentlightning_autogen.uninstrument()
    agentlightning_langchain.uninstrument()


def langchain_agent(stage: Stage) -> Any:
    chat = ChatOpenAI(model="policy", max_retries=0, **stage.openai)
    return create_agent(chat, [add], name="calc")


GO: Any = {"messages": [("user", "1+2?")]}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_langchain_agent_that_runs_by_itself_can_be_learned_from(stage: Stage, stream: bool) -> None:
    stage.engine.script["policy"].extend([CALL, UNKNOWN, BROKEN, "3"])
    handler = LightningCallbackHandler()
    agent = langchain_agent(stage)
    if stream:
        assert list(agent.stream(GO, config={"callbacks": [handler]}, stream_mode="messages"))
    else:
        agent.invoke(GO, config={"callbacks": [handler]})
    assert handler.rollout_id is not None
    stage.client.add_reward(handler.rollout_id, 1.0)  # at once, before the spans were sent
    episode = stage.episode(handler.rollout_id)
    stage.assert_exact(episode)
    assert episode.final_reward == 1.0
    assert [t.agent_name for t in episode.transitions] == ["calc"] * 4
    assert [t.node_path for t in episode.transitions] == ["model"] * 4
    assert [(call.name, call.status) for call in episode.tool_calls] == [
        ("add", ToolStatus.OK),
        ("nope", ToolStatus.UNKNOWN_TOOL),
        ("add", ToolStatus.BAD_ARGUMENTS),
    ]
    assert [run.name for run in episode.agent_runs] == ["calc"]
    assert all(call.gateway_span_id not in (None, call.span_id) for call in episode.calls)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_an_autogen_agent_that_runs_by_itself_can_be_learned_from(stage: Stage, stream: bool) -> None:
    stage.engine.script["policy"].extend([CALL, UNKNOWN, BROKEN, "3"])

    async def main() -> str:
        client = OpenAIChatCompletionClient(model="policy", model_info=INFO, **stage.openai)
        agent = AssistantAgent("calc", client, tools=[add], max_tool_iterations=5, model_client_stream=stream)
        with trace("task") as task:
            await agent.run(task="1+2?")
        await client.close()
        return task.rollout_id

    rollout_id = asyncio.run(main())
    stage.client.add_reward(rollout_id, 0.5)
    episode = stage.episode(rollout_id)
    stage.assert_exact(episode)
    assert episode.final_reward == 0.5
    assert [t.agent_name for t in episode.transitions] == ["calc"] * 4
    assert [(call.name, call.status) for call in episode.tool_calls] == [
        ("add", ToolStatus.OK),
        ("nope", ToolStatus.UNKNOWN_TOOL),
        ("add", ToolStatus.BAD_ARGUMENTS),
    ]
    assert all(call.gateway_span_id not in (None, call.span_id) for call in episode.calls)


def test_two_agents_at_once_are_two_rollouts(stage: Stage) -> None:
    stage.engine.script["policy"].extend(["one", "two"])

    async def main() -> list[str | None]:
        handlers = [LightningCallbackHandler() for _ in range(2)]
        agent = langchain_agent(stage)
        await asyncio.gather(*(agent.ainvoke(GO, config={"callbacks": [handler]}) for handler in handlers))
        return [handler.rollout_id for handler in handlers]

    first, second = (stage.episode(str(rollout_id)) for rollout_id in asyncio.run(main()))
    assert first.rollout_id != second.rollout_id
    said = sorted(tuple(t.response_ids.tolist()) for e in (first, second) for t in e.transitions)
    assert said == sorted(tuple(tokens) for _, tokens, _ in stage.engine.sampled["policy"])
    assert [len(first.transitions), len(second.transitions)] == [1, 1]
