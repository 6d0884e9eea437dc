"""Agents that run by themselves, in each framework: the reward comes later, from another process, by id."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.adapters.acceptance.harness import SCRIPTS, Case, Driver, Stage, Way, staged
from tests.adapters.acceptance.test_matrix import INSTALLED, driver_of

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.client import LightningClient
from agentlightning.context import ENV_KEY, ENV_URL
from agentlightning.learning import AIR
from agentlightning.learning.air import apply_air
from agentlightning.tracing import get_tracer, trace

REWARD = "import sys; from agentlightning import LightningClient; " + (
    "LightningClient.from_env().add_reward(sys.argv[1], float(sys.argv[2]))"
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("live"), "light") as running:
        yield running


@pytest.fixture(params=INSTALLED)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    chosen = driver_of(request.param)
    chosen.instrument()
    yield chosen
    chosen.uninstrument()


def run_live(driver: Driver, stage: Stage) -> str:
    """Run the agent of case OK; the id of the live rollout that this opened."""
    before = stage.rollout_ids()
    model = stage.model((driver.scripts.get(Case.OK) or SCRIPTS[Case.OK])())
    agent = driver.agent(Case.OK, stage, model)
    if (Way.SYNC, None) in driver.skips:
        stage.loop.run(_awaited(agent.arun))
    else:
        agent.run()
    assert get_tracer().flush(10)
    (rollout_id,) = stage.rollout_ids() - before
    return rollout_id


async def _awaited(run: object) -> object:
    return await run()  # type: ignore[operator]  # pyright: ignore[reportCallIssue, reportUnknownVariableType]


def reward(stage: Stage, rollout_id: str, value: float) -> None:
    environment = {**os.environ, ENV_URL: stage.url, ENV_KEY: stage.key}
    subprocess.run(
        [sys.executable, "-c", REWARD, rollout_id, str(value)], env=environment, check=True, timeout=60
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")
def test_a_live_run_is_rewarded_later_from_another_process_and_learned_from(
    stage: Stage, driver: Driver
) -> None:
    rollout_ids = [run_live(driver, stage) for _ in range(2)]
    for rollout_id, value in zip(rollout_ids, (1.0, 0.0), strict=True):
        reward(stage, rollout_id, value)
    episodes = [stage.record(rollout_id)[0] for rollout_id in rollout_ids]
    assert [episode.final_reward for episode in episodes] == [1.0, 0.0]
    policies = {t.policy for episode in episodes for t in episode.transitions}
    for episode in episodes:
        shaped = apply_air(episode, AIR())
        assert [signal.rule for signal in shaped.signals] == ["tool_succeeded"]
        (policy,) = {t.policy for t in episode.transitions}
        batch = make_batch([shaped], LearningSettings(policy=policy))
        assert (batch.transitions, batch.rows) == (2, 1), "the second call continues the first's very ids"
    assert len(policies) == 2


def test_a_reward_right_after_a_run_that_never_asked_our_gateway_finds_it(stage: Stage) -> None:
    with LightningClient(stage.url, stage.key) as client:
        with trace("task") as task:
            pass
        client.add_reward(task.rollout_id, 0.5)  # its span still waits in this process
    assert stage.record(task.rollout_id)[0].final_reward == 0.5
