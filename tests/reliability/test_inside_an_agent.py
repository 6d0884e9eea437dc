"""What code that runs as an agent can do with all that it finds in its process: its own work, and no more.

The agent is a real one, in a process of a real runner, against a real server; it tries everything itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.stores import StoreServer, plain_span, queued, store_server

from agentlightning import otlp, semconv
from agentlightning.client import LightningClient
from agentlightning.rewards import emit_reward
from agentlightning.runner import RolloutContext, Worker
from agentlightning.types import AttemptStatus, RolloutStatus, Task
from agentlightning_server.auth import KeyScope

# What an agent might try, with the status that it must be given: its key is known, and does not do.
FORBIDDEN: list[tuple[str, str, Any]] = [
    ("POST", "/api/rollouts/{own}/rewards", {"value": 1}),
    ("POST", "/api/rollouts/other/rewards", {"value": -1}),
    ("GET", "/api/rollouts/other", None),
    ("GET", "/api/rollouts/other/spans", None),
    ("GET", "/api/rollouts", None),
    ("POST", "/api/rollouts", {"rollouts": [{"id": "mine"}]}),
    ("POST", "/api/rollouts/wait", {"ids": ["other"]}),
    ("POST", "/api/rollouts/other/cancel", {}),
    ("POST", "/api/claims", {"worker_id": "agent"}),
    ("POST", "/api/attempts/{own}-1/heartbeat", {"worker_id": "w"}),
    ("POST", "/api/attempts/{own}-1/finish", {"worker_id": "w", "status": "succeeded"}),
    ("POST", "/api/keys", {"scope": "admin"}),
    ("GET", "/api/keys", None),
    ("DELETE", "/api/keys/key-1", None),
    ("GET", "/metrics", None),
    ("POST", "/rollouts/other/attempts/other-1/v1/traces", {"resourceSpans": []}),
]


def curious(task: Any, ctx: RolloutContext) -> float:
    """An agent that tries what it should not, and notes how it went."""
    url, keys = os.environ["AGENTLIGHTNING_URL"], _keys_in_reach()
    own = ctx.rollout.id
    tried: list[Any] = []
    for key in keys:
        headers = {"Authorization": f"Bearer {key}"}
        for method, path, body in FORBIDDEN:
            answer = httpx.request(method, url + path.format(own=own), json=body, headers=headers)
            tried.append([method, path, answer.status_code])
        other = {**headers, "x-agentlightning-project": "other"}
        tried.append(["GET", "project", httpx.get(url + "/api/rollouts", headers=other).status_code])
    spans = httpx.post(
        url + "/v1/traces", json=_spans(own), headers={"Authorization": f"Bearer {keys[0]}"}
    ).json()
    note = {"keys": [key.split("-")[1] for key in keys], "tried": tried, "spans": spans}
    Path(task["note"]).write_text(json.dumps(note))
    emit_reward(0.25, "style")  # the honest way: through the runner
    return 0.5


def _keys_in_reach() -> list[str]:
    found = {value for value in os.environ.values() if value.startswith("agl-")}
    return sorted(found)


def _spans(own: str) -> Any:
    forged = plain_span(1, own, scope=semconv.SCOPE_REWARD, attributes={semconv.REWARD_VALUE: 99.0})
    hidden = plain_span(2, own, attributes={semconv.REWARD_VALUE: 99.0})
    sampled = plain_span(3, own, scope=semconv.SCOPE_GATEWAY)
    elsewhere = plain_span(4, "other")
    honest = plain_span(5, own, name="honest")
    return otlp.export_request([forged, hidden, sampled, elsewhere, honest])


@pytest.fixture
def server(tmp_path: Path) -> Generator[StoreServer]:
    with store_server(tmp_path) as running:
        yield running


def test_an_agent_can_do_its_own_work_and_nothing_else(server: StoreServer, tmp_path: Path) -> None:
    note = tmp_path / "note"
    runner = server.store.mint_key(KeyScope.RUNNER)
    server.store.enqueue([queued("other")])
    (claim,) = server.store.claim("somebody else")
    server.store.enqueue([queued("own", task=Task("t", {"note": str(note)}), attempts=1)])
    agent = "tests.reliability.test_inside_an_agent:curious"
    with LightningClient(server.url, runner) as client, Worker(client, agent):
        (ended,) = server.store.wait(["own"], 60)
    (attempt,) = server.store.attempts("own")
    assert ended.status is RolloutStatus.SUCCEEDED, attempt.error
    noted = json.loads(note.read_text())
    assert noted["keys"] == ["attempt"]  # nothing else is in its environment
    assert {status for *_, status in noted["tried"]} == {403}
    assert len(noted["tried"]) == len(FORBIDDEN) + 1
    assert noted["spans"]["partialSuccess"]["rejectedSpans"] == "4"
    rewards = {
        span.attributes[semconv.REWARD_NAME]: span.attributes[semconv.REWARD_VALUE]
        for span in server.store.spans("own")
        if span.scope == semconv.SCOPE_REWARD
    }
    assert rewards == {"reward": 0.5, "style": 0.25}
    assert "honest" in {span.name for span in server.store.spans("own")}
    assert list(server.store.spans("other")) == []
    assert server.store.rollout("other").status is RolloutStatus.RUNNING
    assert server.store.principal(claim.key) is not None
    assert {r.id for r in server.store.rollouts()} == {"own", "other"}


def test_what_it_kept_of_its_key_is_worth_nothing_after_its_end(server: StoreServer) -> None:
    server.store.enqueue([queued("brief")])
    (claim,) = server.store.claim("w")
    server.store.finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED)
    for path in ("/v1/traces", "/v1/models", "/api/rollouts"):
        headers = {"Authorization": f"Bearer {claim.key}"}
        assert httpx.get(server.url + path, headers=headers).status_code == 401
