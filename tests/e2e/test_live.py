"""An agent that runs by itself, with the one callback handler, and is rewarded later by somebody else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.support.serving import serving, tiny_engine

from agentlightning.bridge import LearningSettings
from agentlightning.client import LightningClient
from agentlightning.types import Mode, RolloutStatus
from agentlightning_server.store import RolloutFilter
from agentlightning_server.training.live import LiveSettings, LiveTrainer
from agentlightning_server.training.local import LocalServer

AGENT = """
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    from agentlightning_langchain import LightningCallbackHandler  # the one line, and its use below

    def lookup(word: str) -> str:
        "Look a word up."
        return word

    handler = LightningCallbackHandler()
    agent = create_agent(ChatOpenAI(model="policy", max_tokens=8), [lookup], name="helper")
    for i in range(4):
        agent.invoke({"messages": [("user", f"question {i}")]}, config={"callbacks": [handler]})
        print(handler.rollout_id)
"""


def live_agent(server: LocalServer) -> list[str]:
    """Run the agent in a process of its own; the ids of its live rollouts."""
    environment = {
        **os.environ,
        "AGENTLIGHTNING_URL": server.url,
        "AGENTLIGHTNING_KEY": server.key,
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": server.key,
    }
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(AGENT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_a_running_agent_learns_from_rewards_that_come_later(tmp_path: Path) -> None:
    with serving(tiny_engine(tmp_path), tmp_path) as server:
        rollout_ids = live_agent(server)
        assert len(set(rollout_ids)) == 4
        stored = server.store.rollouts(RolloutFilter(mode=Mode.LIVE))
        assert {r.id for r in stored} == set(rollout_ids)
        assert {r.status for r in stored} == {RolloutStatus.SUCCEEDED}

        settings = LiveSettings(tmp_path / "live", batch_size=4, learning=LearningSettings())
        trainer = LiveTrainer(server.engine, server.store, settings)
        assert trainer.step() is None, "nothing is learned before there is a reward"
        with LightningClient(server.url, server.key) as client:
            for i, rollout_id in enumerate(rollout_ids):
                client.add_reward(rollout_id, float(i % 2))
        record = trainer.step()
        assert record is not None
        assert (record.episodes, record.version, record.reward) == (4, 1, 0.5)
        assert record.update["response_tokens"] > 0
        assert trainer.step() is None, "a rollout is learned from once"

        trainer.save()
        again = LiveTrainer(server.engine, server.store, settings)
        assert again.step() is None, "also after a restart"


def test_the_live_trace_has_the_agents_name_and_the_exact_ids(tmp_path: Path) -> None:
    from agentlightning.reading import read_episode

    with serving(tiny_engine(tmp_path), tmp_path) as server:
        rollout_id = live_agent(server)[0]
        (attempt,) = server.store.attempts(rollout_id)
        episode = read_episode(server.store.rollout(rollout_id), attempt, server.store.spans(rollout_id))
    (transition,) = episode.transitions
    assert transition.agent_name == "helper"
    assert len(transition.response_ids) == len(transition.logprobs) > 0
    assert not episode.untrainable
