from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.spans import gateway_call, span
from tests.support.waiting import wait_until

from agentlightning import semconv
from agentlightning.types import (
    Batch,
    Reward,
    RolloutStatus,
    SpanStatus,
    live_attempt_id,
    live_rollout_id,
)
from agentlightning_server.store import Store
from agentlightning_server.training.live import LiveSettings, LiveTrainer


class FailsOnce:
    """An engine whose first update fails."""

    def __init__(self) -> None:
        self.tried = 0

    def version(self, _policy: str) -> int:
        return 3

    def update(self, _batch: Batch) -> Mapping[str, float]:
        self.tried += 1
        if self.tried == 1:
            raise RuntimeError("out of memory")
        return {"loss": 0.5}

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)

    def load(self, directory: Path) -> None:
        assert directory.is_dir()


def rewarded(store: Store, number: int, *policies: tuple[str, int]) -> None:
    """A live rollout with a reward, in which these policies, at these versions, were called once each."""
    trace_id = f"{number + 1:032x}"
    ids: dict[str, Any] = {"rollout_id": live_rollout_id(trace_id), "attempt_id": live_attempt_id(trace_id)}
    for at, (name, version) in enumerate(policies or [("policy", 3)]):
        asked = {semconv.POLICY_NAME: name, semconv.POLICY_VERSION: version}
        store.add_spans([gateway_call(1 + at, [1, 2], [3, 4], extra=asked, trace_id=trace_id, **ids)])
    store.add_reward(live_rollout_id(trace_id), Reward(float(number % 2)))


def test_an_update_that_fails_does_not_end_the_learning(tmp_path: Path) -> None:
    engine: Any = FailsOnce()
    records: list[Any] = []
    with Store(tmp_path / "store.db") as store:
        trainer = LiveTrainer(
            engine,
            store,
            LiveSettings(tmp_path, batch_size=2, poll_s=0.02, reward_wait_s=1e12),
            records.append,
        )
        learner = threading.Thread(target=trainer.run)
        learner.start()
        try:
            for number in range(2):
                rewarded(store, number)
            wait_until(lambda: engine.tried == 1)
            for number in range(2, 4):
                rewarded(store, number)
            wait_until(lambda: bool(records))
        finally:
            trainer.stop()
            learner.join()
    assert records[0].episodes == 2
    assert records[0].reward == 0.5


def test_a_rollout_is_learned_from_once_also_after_a_restart(tmp_path: Path) -> None:
    engine: Any = FailsOnce()
    engine.tried = 1
    settings = LiveSettings(tmp_path, batch_size=2)
    with Store(tmp_path / "store.db") as store:
        for number in range(3):
            rewarded(store, number)
        trainer = LiveTrainer(engine, store, settings)
        assert trainer.step() is not None
        trainer.save()
        again = LiveTrainer(engine, store, settings)
        assert again.step() is None, "one is left, too few"
        rewarded(store, 3)
        assert again.step() is not None


def test_what_came_after_the_last_checkpoint_is_learned_again_after_a_kill(tmp_path: Path) -> None:
    engine: Any = FailsOnce()
    engine.tried = 1
    settings = LiveSettings(tmp_path, batch_size=2, checkpoint_every=5)
    with Store(tmp_path / "store.db") as store:
        for number in range(2):
            rewarded(store, number)
        assert LiveTrainer(engine, store, settings).step() is not None
        assert LiveTrainer(engine, store, settings).step() is not None, "the update died with the process"


class TwoPolicies(FailsOnce):
    """An engine with policies of different ages, which notes what they learn from."""

    def __init__(self) -> None:
        super().__init__()
        self.versions = {"writer": 3, "rewriter": 9, "checker": 0}
        self.learned: list[tuple[str, int]] = []

    def version(self, policy: str) -> int:
        return self.versions[policy]

    def update(self, batch: Batch) -> Mapping[str, float]:
        self.learned.append((batch.policy, batch.transitions))
        self.versions[batch.policy] += 1
        return {"loss": 0.5, "seconds": 2.0}


def test_several_policies_learn_each_from_its_own_calls_while_these_are_fresh(tmp_path: Path) -> None:
    engine: Any = TwoPolicies()
    settings = LiveSettings(tmp_path, batch_size=2, max_lag=4, policies=("writer", "rewriter"))
    with Store(tmp_path / "store.db") as store:
        rewarded(store, 0, ("writer", 3), ("rewriter", 4))  # five updates old
        rewarded(store, 1, ("checker", 0))  # does not learn
        rewarded(store, 2, ("writer", 3), ("checker", 0), ("rewriter", 9))
        trainer = LiveTrainer(engine, store, settings)
        assert trainer.step() is None, "one is left, too few"
        rewarded(store, 3, ("writer", 0))
        record = trainer.step()
    assert engine.learned == [("writer", 2), ("rewriter", 1)]
    assert record is not None
    assert (record.version, record.versions) == (4, {"writer": 4, "rewriter": 10})
    assert record.update_s == 4.0
    assert set(record.update) == {"writer/loss", "writer/seconds", "rewriter/loss", "rewriter/seconds"}


def test_a_rewarded_run_that_ended_with_an_exception_is_learned_from(tmp_path: Path) -> None:
    engine: Any = FailsOnce()
    engine.tried = 1
    records: list[Any] = []
    with Store(tmp_path / "store.db") as store:
        trace_id = f"{1:032x}"
        failed: dict[str, Any] = {"trace_id": trace_id, "rollout_id": None, "attempt_id": None}
        store.add_spans([span("invoke_agent a", 9, {}, status=SpanStatus.ERROR, **failed)])
        rewarded(store, 0)
        rewarded(store, 1)
        assert store.rollout(live_rollout_id(trace_id)).status is RolloutStatus.FAILED
        assert LiveTrainer(engine, store, LiveSettings(tmp_path, batch_size=2), records.append).step()
    assert [record.episodes for record in records] == [2]
