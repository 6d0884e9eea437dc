"""Agents with other people's instrumentations against the real server: one episode each, exact ids joined.

They run in an environment that has those packages (requirements-foreign.txt); elsewhere they are skipped, and
tests/core/test_dialects.py reads what was recorded from them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.foreign.applications import APPLICATIONS
from tests.foreign.record import ELSEWHERE, record, run_application
from tests.support.foreign import EXPECTED, assert_read, episode_of
from tests.support.scripted_engine import ScriptedEngine, tool_call
from tests.support.serving import serving, tiny_engine

from agentlightning.client import LightningClient
from agentlightning.reading import read_episode
from agentlightning.types import AttemptStatus, Claim, Episode, Limits, Mode, Rollout, RolloutStatus

pytestmark = pytest.mark.skipif(
    find_spec("openinference") is None, reason="needs the packages of requirements-foreign.txt"
)
HERE = [name for name in APPLICATIONS if name not in ELSEWHERE]
ADD_TWICE = [tool_call("add", a=1, b=2), tool_call("add", a="z"), "3"]


@dataclass
class Stage:
    """The real server, its model scripted, for applications in processes of their own."""

    engine: ScriptedEngine
    url: str
    key: str
    client: LightningClient

    def run(self, name: str, openai_url: str, otlp_url: str, key: str, **env: str) -> None:
        self.engine.script["policy"].clear()  # what a test that failed left behind
        self.engine.script["policy"].extend(ADD_TWICE)
        self.engine.sampled.clear()
        headers = {
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {key}",
            "OPENAI_API_KEY": key,
            "AGENTLIGHTNING_KEY": key,
        }
        run_application(name, openai_url, otlp_url, MODEL="policy", **headers, **env)

    def claimed(self, rollout_id: str) -> Claim:
        self.client.enqueue(
            [Rollout(rollout_id, None, rollout_id, Mode.TRAIN, limits=Limits(max_attempts=1))]
        )
        (claim,) = self.client.claim("worker")
        assert claim.rollout.id == rollout_id
        return claim

    @contextmanager
    def kept(self, claim: Claim) -> Generator[None]:
        """Renews the lease, as a worker does, until the block ends."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(5):
                self.client.heartbeat(claim.attempt.id, "worker")

        renewing = threading.Thread(target=renew)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()

    def episode(self, rollout_id: str) -> Episode:
        rollout, (attempt,) = self.client.rollout(rollout_id)
        return read_episode(rollout, attempt, self.client.spans(rollout_id))

    def assert_exact(self, episode: Episode) -> None:
        """What would be trained on is what the engine sampled, in that order."""
        assert not episode.untrainable
        assert [
            (t.prompt_ids.tolist(), t.response_ids.tolist(), [round(float(p), 4) for p in t.logprobs])
            for t in episode.transitions
        ] == [(p, r, [round(x, 4) for x in logprobs]) for p, r, logprobs in self.engine.sampled["policy"]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stage]:
    folder: Path = tmp_path_factory.mktemp("server")
    engine = ScriptedEngine(tiny_engine(folder, context_length=4096))
    with serving(engine, folder) as server, LightningClient(server.url, server.key) as client:  # type: ignore[arg-type]
        yield Stage(engine, server.url, server.key, client)


@pytest.mark.parametrize("name", HERE)
def test_what_the_installed_package_writes_is_read_in_full(name: str) -> None:
    assert_read(episode_of(record(name)), EXPECTED[name])


STREAMED = [name for name in HERE if "httpx" not in name]


@pytest.mark.parametrize(
    ("name", "stream"),
    [(name, "") for name in HERE] + [(name, "1") for name in STREAMED],
    ids=lambda value: {"": "plain", "1": "stream"}.get(value, value),
)
def test_by_the_urls_of_an_attempt(stage: Stage, name: str, stream: str) -> None:
    """No line of the agent changes: both URLs name the attempt, and its key is the key."""
    claim = stage.claimed(f"{name}-{'stream' if stream else 'plain'}")
    prefix = f"{stage.url}/rollouts/{claim.rollout.id}/attempts/{claim.attempt.id}"
    with stage.kept(claim):
        stage.run(name, f"{prefix}/v1", prefix, claim.key, STREAM=stream)
    stage.client.finish(claim.attempt.id, "worker", AttemptStatus.SUCCEEDED)
    stage.client.add_reward(claim.rollout.id, 1.0)
    episode = stage.episode(claim.rollout.id)
    stage.assert_exact(episode)
    assert_read(episode, EXPECTED[name], "policy", exact=True)
    assert all(call.gateway_span_id not in (None, call.span_id) for call in episode.calls)
    assert episode.final_reward == 1.0


@pytest.mark.parametrize("name", ["openinference_openai_agents", "genai_langchain", "traceloop_crewai"])
def test_by_a_resource_attribute_and_headers(stage: Stage, name: str) -> None:
    """A live rollout that the user names: OpenTelemetry's variables for spans, the SDK's for model calls."""
    rollout_id = f"my-{name}"
    stage.run(
        name,
        f"{stage.url}/v1",
        stage.url,
        stage.key,
        OTEL_RESOURCE_ATTRIBUTES=f"agentlightning.rollout.id={rollout_id}",
        OPENAI_CUSTOM_HEADERS=f"x-agentlightning-rollout: {rollout_id}",
    )
    episode = stage.episode(rollout_id)
    stage.assert_exact(episode)
    assert_read(episode, EXPECTED[name], "policy", exact=True)


@pytest.mark.parametrize("name", ["openai_and_httpx"])
def test_a_live_agent_whose_http_client_is_instrumented_needs_nothing_else(stage: Stage, name: str) -> None:
    """`traceparent` reaches the gateway, so its spans are in the application's own trace."""
    started_ns = time.time_ns()
    stage.run(name, f"{stage.url}/v1", stage.url, stage.key)
    (rollout,) = [r for r in _all_live(stage.client) if r.created_ns >= started_ns]
    assert rollout.status is RolloutStatus.SUCCEEDED
    episode = stage.episode(rollout.id)
    stage.assert_exact(episode)
    assert_read(episode, EXPECTED[name], "policy", exact=True)


def _all_live(client: LightningClient) -> list[Rollout]:
    found: list[Rollout] = []
    while page := client.rollouts(mode=Mode.LIVE, after=found[-1].id if found else None):
        found += page
    return found


def test_every_application_has_an_expectation() -> None:
    assert APPLICATIONS.keys() <= EXPECTED.keys()
