from __future__ import annotations

import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from tests.core.sample_agents import dutiful, lazy, obedient
from tests.support.stores import StoreServer, queued, store_server

from agentlightning import semconv
from agentlightning.errors import InvalidInput, InvalidReward, PermissionDenied
from agentlightning.runner import Worker, load
from agentlightning.runner.agent import Agent, reference_of, rewards_of, takes_context
from agentlightning.types import Attempt, AttemptStatus, Rollout, RolloutStatus, Task

MODULE = "tests.core.sample_agents"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("runner")) as running:
        yield running


@pytest.fixture(scope="module", params=["process", "inline"])
def isolation(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def worker(server: StoreServer, isolation: Any) -> Generator[Worker]:
    with Worker(
        server.client, f"{MODULE}:obedient", concurrency=4, isolation=isolation, heartbeat_s=0.1
    ) as running:
        yield running


def run(
    server: StoreServer, isolation: str, name: str, task: dict[str, Any], **limits: Any
) -> tuple[Rollout, Attempt]:
    """Run one task to its end: the rollout and its last attempt."""
    rollout_id = f"{isolation}-{name}"
    server.store.enqueue([queued(rollout_id, task=Task(name, task), **{"attempts": 1, **limits})])
    (ended,) = server.store.wait([rollout_id], 60)
    return ended, server.store.attempts(rollout_id)[-1]


def rewards(server: StoreServer, rollout_id: str) -> list[tuple[str, float]]:
    spans = [s for s in server.store.spans(rollout_id) if s.scope == semconv.SCOPE_REWARD]
    return [
        (str(s.attributes[semconv.REWARD_NAME]), float(str(s.attributes[semconv.REWARD_VALUE])))
        for s in spans
    ]


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("none", None, []),
        ("number", 0.5, [("reward", 0.5)]),
        ("int", 3, [("reward", 3.0)]),
        ("dict", {"reward": 1, "style": 0.5}, [("reward", 1.0), ("style", 0.5)]),
    ],
)
def test_what_the_agent_returns_is_its_reward(
    server: StoreServer, worker: Worker, isolation: str, name: str, value: Any, expected: Any
) -> None:
    ended, _ = run(server, isolation, f"return-{name}", {"do": "return", "value": value})
    assert ended.status is RolloutStatus.SUCCEEDED
    assert sorted(rewards(server, ended.id)) == expected


@pytest.mark.parametrize("value", ["good", True, [1.0], {"reward": "high"}])
def test_a_return_value_that_is_no_reward_fails_the_attempt_in_a_sentence(
    server: StoreServer, worker: Worker, isolation: str, value: Any
) -> None:
    ended, attempt = run(
        server, isolation, f"bad-{value!r}".translate(NO_URL), {"do": "return", "value": value}
    )
    assert ended.status is RolloutStatus.FAILED
    assert "return a finite number" in (attempt.error or "")
    assert "Traceback" not in (attempt.error or "")


NO_URL = {ord(c): "_" for c in "'[]{}: "}


def test_a_reward_that_is_not_finite_fails_the_attempt(
    server: StoreServer, worker: Worker, isolation: str
) -> None:
    _, attempt = run(server, isolation, "nan", {"do": "nan"})
    assert attempt.status is AttemptStatus.FAILED
    assert "finite" in (attempt.error or "")


def test_emitted_rewards_go_with_the_returned_ones(
    server: StoreServer, worker: Worker, isolation: str
) -> None:
    ended, _ = run(server, isolation, "emit", {"do": "emit", "values": [0.1, 0.1, 0.2]})
    assert sorted(rewards(server, ended.id)) == [
        ("reward", 1.0),
        ("step", 0.1),
        ("step", 0.1),
        ("step", 0.2),
        ("style", 0.5),
    ]


def test_an_agent_that_raises_fails_with_its_own_traceback_and_no_other_does(
    server: StoreServer, worker: Worker, isolation: str
) -> None:
    ids = [f"{isolation}-beside-{i}" for i in range(6)]
    server.store.enqueue([queued(i, task=Task(i, {"do": "return", "value": 1.0})) for i in ids])
    ended, attempt = run(server, isolation, "raise", {"do": "raise"})
    assert ended.status is RolloutStatus.FAILED
    assert "do_raise" in (attempt.error or "")
    assert "ValueError: boom \\ud800 1" in (attempt.error or "")
    assert "run_to_outcome" not in (attempt.error or "")
    assert rewards(server, ended.id) == [("before", 0.5)]
    assert {r.status for r in server.store.wait(ids, 30)} == {RolloutStatus.SUCCEEDED}


def test_sys_exit_ends_the_attempt_alone(server: StoreServer, worker: Worker, isolation: str) -> None:
    _, attempt = run(server, isolation, "exit", {"do": "exit"})
    assert "SystemExit: 3" in (attempt.error or "")


def test_a_failed_attempt_is_retried_by_the_same_worker(
    server: StoreServer, worker: Worker, isolation: str
) -> None:
    ended, attempt = run(server, isolation, "retry", {"do": "raise"}, attempts=2)
    assert (ended.status, attempt.number) == (RolloutStatus.FAILED, 2)


def test_a_function_that_returns_a_coroutine_is_awaited(
    server: StoreServer, worker: Worker, isolation: str
) -> None:
    ended, _ = run(server, isolation, "async", {"do": "async"})
    assert rewards(server, ended.id) == [("reward", 2.0)]


def test_the_agents_spans_are_stored_when_the_rollout_is_final(
    server: StoreServer, worker: Worker, isolation: str
) -> None:
    ended, attempt = run(server, isolation, "trace", {"do": "trace"})
    spans = server.store.spans(ended.id)
    assert [(s.name, s.attempt_id) for s in spans] == [("thinking", attempt.id), ("reward", attempt.id)]


@pytest.fixture
def alone(tmp_path: Path) -> Generator[StoreServer]:
    """A server without the worker that most tests share."""
    with store_server(tmp_path) as running:
        yield running


# --- inline --------------------------------------------------------------------------------------


def test_async_agents_run_together_inline_and_are_cancelled_at_their_limit(alone: StoreServer) -> None:
    server = alone
    with Worker(server.client, dutiful, concurrency=20, isolation="inline", heartbeat_s=0.1):
        ids = [f"together-{i}" for i in range(10)]
        server.store.enqueue([queued(i, task=Task(i, {"do": "wait"}), seconds=0.5, attempts=1) for i in ids])
        server.store.enqueue([queued("quick", task=Task("q", {"do": "return"}))])
        assert len(server.store.wait([*ids, "quick"], 30)) == 11
    assert {server.store.attempts(i)[0].status for i in ids} == {AttemptStatus.TIMED_OUT}
    assert sorted(rewards(server, "quick")) == [("reward", 1.0), ("style", 0.25)]


def test_a_hung_sync_agent_is_given_up_inline(alone: StoreServer) -> None:
    with Worker(alone.client, lazy, isolation="inline"):
        ended, attempt = run(alone, "inline", "lazy", {}, seconds=0.2)
    assert (ended.status, attempt.status) == (RolloutStatus.FAILED, AttemptStatus.TIMED_OUT)


# --- agents and references -----------------------------------------------------------------------


def test_an_agent_that_cannot_be_loaded_ends_the_worker_with_the_reason(
    server: StoreServer, tmp_path: Path
) -> None:
    broken = tmp_path / "broken_agent.py"
    broken.write_text("import sys\nraise RuntimeError('no licence')\n")
    cases = [
        (f"{broken}:run", "no licence"),
        (f"{tmp_path}/missing.py:run", "there is no file"),
        ("no.such.module:run", "there is no module 'no'"),
        (f"{MODULE}:missing", "has no 'missing'"),
        (f"{MODULE}:imported_at", "is a int, not a function"),
        ("nonsense", "write MODULE:FUNCTION"),
    ]
    for isolation in ("process", "inline"):
        for reference, reason in cases:
            if isolation == "inline" and "licence" in reason:
                continue
            with pytest.raises(InvalidInput, match=reason.replace("(", r"\(")):
                Worker(server.client, reference, isolation=isolation).run()


def test_a_wrong_key_ends_the_worker(server: StoreServer) -> None:
    from agentlightning.client import LightningClient

    with LightningClient(server.url, "wrong") as client, pytest.raises(PermissionDenied):
        Worker(client, dutiful, isolation="inline").run()


def test_a_file_is_loaded_with_the_modules_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_agent_file.py").write_text("VALUE = 4.0\n")
    file = tmp_path / "agent_file.py"
    file.write_text("from beside_agent_file import VALUE\ndef run(task): return VALUE\n")
    assert load(f"{file}:run")(None) == 4.0


def test_references_are_found_again() -> None:
    assert reference_of(obedient) == f"{MODULE}:obedient"
    assert load(reference_of(obedient)) is obedient
    assert reference_of("a:b") == "a:b"

    def local(task: object) -> None: ...

    with pytest.raises(InvalidInput, match="top level of a module"):
        reference_of(local)


def one(task: object) -> None: ...
def two(task: object, context_: object) -> None: ...
def optional(task: object, temperature: float = 1.0) -> None: ...
def optional_context(task: object, ctx: object = None) -> None: ...
def anything(*args: object) -> None: ...
def none() -> None: ...
def three(a: object, b: object, c: object) -> None: ...


@pytest.mark.parametrize(
    ("agent", "wanted"),
    [(one, False), (two, True), (optional, False), (optional_context, True), (anything, True)],
)
def test_the_context_is_passed_to_those_that_take_it(agent: Agent, wanted: bool) -> None:
    assert takes_context(agent) is wanted


@pytest.mark.parametrize("agent", [none, three])
def test_functions_with_other_parameters_are_refused(agent: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInput, match="fn\\(task_input, ctx\\)"):
        takes_context(agent)


def test_numpy_numbers_are_rewards_and_odd_names_are_not() -> None:
    import numpy as np

    assert [r.value for r in rewards_of(np.float32(0.5))] == [0.5]
    for bad in (np.float64(math.inf), {1: 1.0}, {"": 1.0}):
        with pytest.raises(InvalidReward):
            rewards_of(bad)
