"""Prompts to rows over the real store; a worker is stood in for by what it leaves behind. Needs no VeRL."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.spans import gateway_call

from agentlightning import semconv
from agentlightning.bridge import LearningSettings
from agentlightning.types import AttemptStatus, Claim, Limits, Mode, Reward, Task
from agentlightning_server.store import Store
from agentlightning_server.verl.collecting import Collector, Plan, Prompt
from agentlightning_server.verl.rows import Row

Agent = Callable[[Claim], float | None]
PROMPTS = [Prompt("k0", 0, Task("a", "a")), Prompt("k1", 1, Task("b", "b"))]


class Sink:
    """Keeps what VeRL would get."""

    def __init__(self) -> None:
        self.status: dict[str, str] = {}
        self.rows: dict[str, Row] = {}

    def begin(self, keys: Sequence[str], mode: Mode) -> None:
        self.status |= dict.fromkeys(keys, "running")

    def put(self, rows: Mapping[str, Row], mode: Mode, step: int) -> None:
        self.rows |= rows

    def finish(self, key: str, mode: Mode, *, failed: bool) -> None:
        assert self.status[key] == "running"
        self.status[key] = "failed" if failed else "finished"


@pytest.fixture
def store(tmp_path: Path) -> Generator[Store]:
    with Store(tmp_path / "store.db") as opened:
        yield opened


def work(store: Store, agent: Agent, *, temperature: float = 1.0) -> int:
    """Run everything that is queued: two calls that continue each other, then the agent's reward."""
    claims = store.claim("w", 100)
    for at, claim in enumerate(claims):
        shared: dict[str, Any] = {
            "rollout_id": claim.rollout.id,
            "attempt_id": claim.attempt.id,
            "trace_id": f"{at + 1:032x}",
            "extra": {semconv.REQUEST_TEMPERATURE: temperature},
        }
        first, second = (
            gateway_call(10, [1, 2], [3], **shared),
            gateway_call(20, [1, 2, 3, 4], [5, 6], **shared),
        )
        store.add_spans([first, second])
        reward = agent(claim)
        if reward is None:
            store.finish(claim.attempt.id, "w", AttemptStatus.FAILED, "RuntimeError: no tool")
        else:
            store.finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED, rewards=[Reward(reward)])
    return len(claims)


def sample_of(claim: Claim) -> int:
    return int(claim.rollout.id.rsplit(".", 1)[1])


def of_second(claim: Claim) -> bool:
    """Whether it is a rollout of the second prompt."""
    return claim.rollout.id.split(".")[-2] == "1"


def collector(store: Store, sink: Sink, **changes: object) -> Collector:
    plan = {"run_id": "run", "learning": LearningSettings(), "group_size": 2, "eos_id": 0}
    plan |= {"limits": Limits(max_attempts=1), **changes}
    return Collector(store, Plan(**plan), sink)  # type: ignore[arg-type]


def test_a_group_is_handed_over_when_its_last_rollout_has_ended(store: Store) -> None:
    sink = Sink()
    collecting = collector(store, sink)
    collecting.submit(PROMPTS, mode=Mode.TRAIN, step=1, group_size=2)
    collecting.poll(0)
    assert set(sink.status.values()) == {"running"}
    assert work(store, lambda claim: float(sample_of(claim))) == 4
    collecting.poll(1)
    assert sink.status == {"k0": "finished", "k1": "finished"}
    assert sorted(sink.rows) == ["k0_0_0", "k0_1_0", "k1_0_0", "k1_1_0"]
    row = sink.rows["k0_1_0"]
    assert (row.prompt_ids.tolist(), row.response_ids.tolist()) == ([1, 2], [3, 4, 5, 6])
    assert row.response_mask.tolist() == [True, False, True, True]
    assert row.advantages[0] == pytest.approx(0.7071, abs=1e-3)
    assert sink.rows["k0_0_0"].advantages[0] == pytest.approx(-0.7071, abs=1e-3)
    tally = collecting.tallies[0]
    assert (tally.groups, tally.mixed, tally.open, tally.sampled_tokens) == (2, 2, 0, 12)
    assert tally.collected.mean_reward == 0.5
    assert collecting.open == 0


def test_what_failed_leaves_the_rest_of_its_group(store: Store) -> None:
    sink = Sink()
    collecting = collector(store, sink)
    collecting.submit(PROMPTS, mode=Mode.TRAIN, step=1, group_size=3)

    def fails(claim: Claim) -> bool:
        return of_second(claim) or sample_of(claim) == 2

    work(store, lambda claim: None if fails(claim) else float(sample_of(claim)))
    collecting.poll(1)
    assert sink.status == {"k0": "finished", "k1": "failed"}
    assert sorted(sink.rows) == ["k0_0_0", "k0_1_0"]
    assert collecting.tallies[0].collected.problems["RuntimeError: no tool"] == 4


def test_a_validation_counts_failures_as_zero(store: Store) -> None:
    sink = Sink()
    collecting = collector(store, sink)
    collecting.submit(PROMPTS, mode=Mode.VAL, step=5, group_size=1)
    work(store, lambda claim: None if of_second(claim) else 0.75)
    collecting.poll(1)
    assert {name: float(row.rewards.sum()) for name, row in sink.rows.items()} == {
        "k0_0_0": 0.75,
        "k1_0_0": 0,
    }
    assert set(sink.status.values()) == {"finished"}


def test_a_second_start_takes_what_the_first_had_finished(store: Store) -> None:
    collector(store, Sink()).submit(PROMPTS, mode=Mode.TRAIN, step=3, group_size=2)
    assert work(store, lambda claim: float(sample_of(claim))) == 4
    sink = Sink()
    again = collector(store, sink)
    again.submit(
        [Prompt("other", p.position, p.task) for p in PROMPTS[:1]], mode=Mode.TRAIN, step=3, group_size=2
    )
    assert work(store, lambda _: 0.0) == 0, "nothing is run again"
    again.poll(1)
    assert sorted(sink.rows) == ["other_0_0", "other_1_0"]


def test_a_step_that_was_given_up_is_run_anew(store: Store) -> None:
    collector(store, Sink()).submit(PROMPTS, mode=Mode.TRAIN, step=3, group_size=2)
    assert work(store, lambda _: None) == 4
    again = collector(store, Sink(), retries={"train.3": 1})
    again.submit(PROMPTS, mode=Mode.TRAIN, step=3, group_size=2)
    assert work(store, lambda _: 1.0) == 4


def test_calls_at_another_temperature_are_left_out_and_counted(store: Store) -> None:
    sink = Sink()
    collecting = collector(store, sink)
    collecting.submit(PROMPTS[:1], mode=Mode.TRAIN, step=1, group_size=2)
    work(store, lambda claim: float(sample_of(claim)), temperature=0.3)
    collecting.poll(1)
    assert sink.status == {"k0": "failed"}
    (problem,) = (s for s in collecting.tallies[0].collected.problems if "temperature" in s)
    assert "rollout.temperature (1)" in problem


def test_a_group_ends_with_its_time_when_no_runner_comes(store: Store) -> None:
    sink = Sink()
    collecting = collector(store, sink, step_timeout_s=0.0)
    collecting.submit(PROMPTS[:1], mode=Mode.TRAIN, step=1, group_size=2)
    collecting.poll(0)
    assert sink.status == {"k0": "failed"}
    assert collecting.open == 0
    assert work(store, lambda _: 1.0) == 0, "they were cancelled"


def test_steps_without_a_difference_are_counted(store: Store) -> None:
    collecting = collector(store, Sink())
    for step in (1, 2, 3):
        collecting.submit(PROMPTS, mode=Mode.TRAIN, step=step, group_size=2)
        work(store, (lambda claim: float(sample_of(claim))) if step == 1 else lambda _: 1.0)
        collecting.poll(1)
    assert collecting.flat_steps == 2
