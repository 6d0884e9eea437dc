from __future__ import annotations

import asyncio
import threading

import pytest

from agentlightning import context
from agentlightning.context import (
    ActiveRollout,
    SpanRef,
    current_rollout,
    open_span,
    set_process_rollout,
    use_open_span,
    use_rollout,
)


def rollout_id() -> str | None:
    active = current_rollout()
    return None if active is None else active.rollout_id


def in_thread() -> str | None:
    seen: list[str | None] = []
    thread = threading.Thread(target=lambda: seen.append(rollout_id()))
    thread.start()
    thread.join()
    return seen[0]


def test_there_is_no_rollout_by_default() -> None:
    assert current_rollout() is None


def test_two_rollouts_under_gather_keep_apart() -> None:
    async def one(name: str) -> list[str | None]:
        with use_rollout(ActiveRollout(name, f"{name}-1")):
            before = rollout_id()
            await asyncio.sleep(0)
            return [before, await asyncio.create_task(nested())]

    async def nested() -> str | None:
        await asyncio.sleep(0)
        return rollout_id()

    async def both() -> list[list[str | None]]:
        return list(await asyncio.gather(one("a"), one("b")))

    assert asyncio.run(both()) == [["a", "a"], ["b", "b"]]


def test_a_thread_started_by_hand_sees_the_process_rollout_only() -> None:
    with use_rollout(ActiveRollout("context", "context-1")):
        assert in_thread() is None
        set_process_rollout(ActiveRollout("process", "process-1"))
        try:
            assert in_thread() == "process"
            assert rollout_id() == "context"
        finally:
            set_process_rollout(None)


def test_the_environment_names_the_rollout_of_a_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(context.ENV_ROLLOUT_ID, "r1")
    assert current_rollout() is None  # half an identity is none
    monkeypatch.setenv(context.ENV_ATTEMPT_ID, "r1-2")
    monkeypatch.setenv(context.ENV_URL, "http://127.0.0.1:1/")
    monkeypatch.setenv(context.ENV_KEY, "secret")
    active = current_rollout()
    assert active is not None
    assert (active.rollout_id, active.attempt_id, active.api_key) == ("r1", "r1-2", "secret")
    assert active.base_url == "http://127.0.0.1:1/rollouts/r1/attempts/r1-2/v1"
    assert "secret" not in repr(active)
    assert in_thread() == "r1"


def test_a_closed_span_is_not_open_even_where_it_was_left_behind() -> None:
    ref = SpanRef("a" * 32, "b" * 16)
    with use_open_span(ref):
        assert open_span() is ref
        ref.closed = True
        assert open_span() is None
    assert open_span() is None


def test_the_traceparent_header_is_the_specified_one() -> None:
    assert SpanRef("a" * 32, "b" * 16).traceparent == f"00-{'a' * 32}-{'b' * 16}-01"
