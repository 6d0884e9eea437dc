from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from agentlightning import semconv
from agentlightning.context import ActiveRollout, use_rollout
from agentlightning.errors import InvalidReward
from agentlightning.rewards import emit_reward
from agentlightning.tracing import capture_spans, trace
from agentlightning.types import Reward


def test_a_reward_in_a_rollout_goes_to_its_sink_and_not_to_a_span() -> None:
    taken: list[Reward] = []
    with capture_spans() as spans, use_rollout(ActiveRollout("r", "r-1", report_reward=taken.append)):
        reward = emit_reward(0.5, "style", target="a" * 16)
    assert taken == [reward]
    assert (reward.value, reward.name, reward.target) == (0.5, "style", "a" * 16)
    assert spans == []


def test_a_reward_in_a_live_trace_is_a_span_of_it() -> None:
    with capture_spans() as spans, trace("task") as task:
        emit_reward(1, target="b" * 16)
    reward_span, root = spans
    assert reward_span.scope == semconv.SCOPE_REWARD
    assert (reward_span.trace_id, reward_span.parent_id) == (task.trace_id, root.span_id)
    assert reward_span.attributes == {
        semconv.REWARD_VALUE: 1.0,
        semconv.REWARD_NAME: "reward",
        semconv.REWARD_TARGET: "b" * 16,
    }


def test_a_reward_in_a_rollout_without_a_sink_is_a_span_with_its_ids() -> None:
    with capture_spans() as spans, use_rollout(ActiveRollout("r", "r-1")):
        emit_reward(0.0)
    assert [(span.rollout_id, span.attempt_id) for span in spans] == [("r", "r-1")]


def test_a_reward_outside_of_any_trace_is_a_warning_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), capture_spans() as spans:
        assert emit_reward(1.0).value == 1.0
    assert spans == []
    assert "[non-fatal]" in caplog.text
    assert "agentlightning.trace" in caplog.text


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), True, np.True_, "1", None, [1.0], np.array([1.0, 2.0]), 1j]
)
def test_a_value_that_is_not_a_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidReward):
        emit_reward(value)


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(2), np.array(0.25)])
def test_numpy_scalars_are_numbers(value: Any) -> None:
    taken: list[Reward] = []
    with use_rollout(ActiveRollout("r", "r-1", report_reward=taken.append)):
        emit_reward(value)
    assert taken[0].value == float(value)


@pytest.mark.parametrize(
    ("name", "target"), [("", None), (3, None), ("reward", "short"), ("reward", "Z" * 16)]
)
def test_an_unusable_name_or_target_is_refused(name: Any, target: Any) -> None:
    with pytest.raises(InvalidReward):
        emit_reward(1.0, name, target)


def test_a_sink_that_fails_does_not_reach_the_agent(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Reward) -> None:
        raise RuntimeError("sink")

    with caplog.at_level(logging.WARNING), use_rollout(ActiveRollout("r", "r-1", report_reward=broken)):
        assert emit_reward(1.0).value == 1.0
