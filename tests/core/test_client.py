from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.support.stores import StoreServer, plain_span, queued, store_server

from agentlightning import errors, wire
from agentlightning.bridge import RolloutService
from agentlightning.client import LightningClient
from agentlightning.types import (
    Attempt,
    AttemptStatus,
    Claim,
    Limits,
    Mode,
    Reward,
    Rollout,
    RolloutStatus,
    Task,
    live_rollout_id,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("client")) as running:
        yield running


def test_store_and_client_serve_the_trainer_alike(server: StoreServer) -> None:
    services: list[RolloutService] = [server.store, server.client]
    for number, service in enumerate(services):
        a, b = f"a{number}", f"b{number}"
        service.enqueue([queued(a, run_id="run"), queued(b)])
        claims = server.client.claim("w", 2)
        assert [claim.rollout.id for claim in claims] == [a, b]
        server.client.add_spans([plain_span(number, a)])
        server.client.finish(f"{a}-1", "w", AttemptStatus.SUCCEEDED, rewards=[Reward(0.5)])
        assert [r.id for r in service.wait([a, b], 0.05)] == [a]
        service.cancel([b])
        ended = service.wait([a, b], 10.0)
        assert [r.status for r in ended] == [RolloutStatus.SUCCEEDED, RolloutStatus.CANCELLED]
        assert ended[0].task == queued(a).task
        assert [s.name for s in service.spans(a)] == ["work", "reward"]
        assert [x.status for x in service.attempts(b)] == [AttemptStatus.CANCELLED]


def test_both_give_the_same_objects(server: StoreServer) -> None:
    server.store.enqueue([queued("same", policy_version=3, mode=Mode.VAL)])
    server.store.claim("w")
    server.store.add_spans([plain_span(50, "same", attributes={"b": b"\0\xff", "n": 1, "x": [None, 0.5]})])
    assert server.client.rollout("same") == (server.store.rollout("same"), server.store.attempts("same"))
    assert list(server.client.spans("same")) == list(server.store.spans("same"))
    assert server.client.rollouts(mode=Mode.VAL) == [server.store.rollout("same")]


def test_errors_come_back_as_their_types(server: StoreServer) -> None:
    client = server.client
    server.store.enqueue([queued("err")])
    server.store.claim("w", 10)
    calls: list[tuple[type[Exception], Any]] = [
        (errors.NotFound, lambda: client.rollout("nope")),
        (errors.NotFound, lambda: client.wait(["nope"], 0.1)),
        (errors.Conflict, lambda: client.heartbeat("err-1", "somebody else")),
        (errors.InvalidInput, lambda: client.rollouts(limit=0)),
        (errors.InvalidInput, lambda: client.enqueue([queued("a/b")])),
        (errors.InvalidReward, lambda: client.add_reward("err", float("nan"))),
    ]
    for kind, call in calls:
        with pytest.raises(kind):
            call()
    with LightningClient(server.url, "wrong") as stranger, pytest.raises(errors.PermissionDenied):
        stranger.rollouts()


def test_a_task_that_is_no_json_is_refused_here(server: StoreServer) -> None:
    for value in (object(), float("nan")):
        with pytest.raises(errors.InvalidInput, match="JSON"):
            server.client.enqueue([queued("x", task=Task("t", {"v": value}))])  # type: ignore[dict-item]


def test_a_reward_by_rollout_id_after_the_trace(server: StoreServer) -> None:
    span = plain_span(60)
    rollout_id = live_rollout_id(span.trace_id)
    assert server.client.add_spans([span]) == 0
    assert server.client.add_reward(rollout_id, 1, "thumbs", target=span.span_id) == f"{rollout_id}-1"
    assert len(server.client.spans(rollout_id)) == 2


def test_an_unreachable_server_is_unavailable_after_the_retries() -> None:
    pauses: list[float] = []
    with LightningClient("http://127.0.0.1:9", "k", retries=3, sleep=pauses.append) as client:
        with pytest.raises(errors.Unavailable, match="is the server running"):
            client.rollouts()
        assert client.healthy() is False
    assert len(pauses) == 3
    assert pauses[2] > pauses[0]


@contextmanager
def scripted(answers: Sequence[int]) -> Generator[tuple[str, list[str]]]:
    """A server that answers with these statuses, one after the other, then with 200; 0 hangs up."""
    left, seen = list(answers), list[str]()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append(self.path)
            status = left.pop(0) if left else 200
            if status == 0:
                self.connection.close()
                return
            body = json.dumps({"claims": [], "error": {"message": "busy", "code": "unavailable"}}).encode()
            self.send_response(status)
            self.send_header("Retry-After", "3")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", seen
        running.shutdown()
        thread.join()


def test_busy_answers_are_tried_again_after_the_time_they_ask_for() -> None:
    pauses: list[float] = []
    with scripted([503, 429]) as (url, seen), LightningClient(url, "k", sleep=pauses.append) as client:
        client.heartbeat("a", "w")
    assert len(seen) == 3
    assert pauses == [3.0, 3.0]


def test_a_lost_answer_repeats_what_may_be_repeated_only() -> None:
    with scripted([0, 0]) as (url, seen), LightningClient(url, "k", sleep=lambda _: None) as client:
        client.finish("a", "w", AttemptStatus.SUCCEEDED)
        assert len(seen) == 3
    with scripted([0]) as (url, seen), LightningClient(url, "k", sleep=lambda _: None) as client:
        with pytest.raises(errors.Unavailable):
            client.claim("w")
        assert len(seen) == 1


def test_other_errors_are_not_tried_again() -> None:
    with scripted([500]) as (url, seen), LightningClient(url, "k", sleep=lambda _: None) as client:
        with pytest.raises(errors.AgentLightningError, match="busy"):
            client.heartbeat("a", "w")
        assert len(seen) == 1


def test_importing_the_package_imports_no_http_client() -> None:
    code = "import sys, agentlightning.client; print('httpx' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# --- the codec -----------------------------------------------------------------------------------

texts = st.text(max_size=8)
naturals = st.integers(0, 2**63 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
rollouts = st.builds(
    Rollout,
    id=texts,
    task=st.none() | st.builds(Task, id=texts, input=json_values, split=texts),
    group_id=texts,
    mode=st.sampled_from(Mode),
    policy_version=st.none() | naturals,
    limits=st.builds(Limits, st.floats(1e-3, 1e6), st.integers(1, 1000)),
    status=st.sampled_from(RolloutStatus),
    run_id=st.none() | texts,
    created_ns=naturals,
    ended_ns=st.none() | naturals,
)
attempts = st.builds(
    Attempt,
    id=texts,
    rollout_id=texts,
    number=naturals,
    worker_id=texts,
    status=st.sampled_from(AttemptStatus),
    lease_expires_ns=naturals,
    deadline_ns=naturals,
    started_ns=naturals,
    ended_ns=st.none() | naturals,
    error=st.none() | texts,
)
rewards = st.builds(
    Reward,
    value=st.floats(allow_nan=False, allow_infinity=False, width=32),
    name=texts,
    target=st.none() | texts,
    time_ns=naturals,
    span_id=st.none(),
)


@given(st.builds(Claim, rollouts, attempts, texts, texts), rewards)
@hypothesis_settings(max_examples=100, deadline=None)
def test_json_gives_back_what_went_in(claim: Claim, reward: Reward) -> None:
    def there_and_back(body: object) -> object:
        return json.loads(json.dumps(body))

    assert wire.claim_from_json(there_and_back(wire.claim_to_json(claim))) == claim
    assert wire.reward_from_json(there_and_back(wire.reward_to_json(reward))) == reward


@given(json_values, st.dictionaries(st.sampled_from(["id", "task", "limits", "value", "mode"]), json_values))
@hypothesis_settings(max_examples=200, deadline=None)
def test_json_of_any_shape_is_read_or_refused(junk: object, fields: object) -> None:
    for body in (junk, fields):
        for read in (
            wire.rollout_from_json,
            wire.attempt_from_json,
            wire.claim_from_json,
            wire.reward_from_json,
        ):
            with contextlib.suppress(errors.InvalidInput):
                read(body)


def test_a_client_without_a_key_is_told_that_one_is_missing(server: StoreServer) -> None:
    with LightningClient(server.url, "") as client, pytest.raises(errors.PermissionDenied, match="key"):
        client.rollouts()
