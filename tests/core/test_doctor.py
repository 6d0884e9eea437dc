from __future__ import annotations

from dataclasses import replace

from tests.support.spans import adapter_call, agent_run, attempt, gateway_call, reward, rollout, tool

from agentlightning.bridge import LearningSettings
from agentlightning.doctor import Finding, Level, Recorded, diagnose
from agentlightning.learning import AIR, select_agents
from agentlightning.types import AttemptStatus, RolloutStatus, Span


def recorded(spans: list[Span], number: int = 1, group: str = "g1") -> Recorded:
    own = [replace(span, rollout_id=f"r{number}", attempt_id=f"r{number}-1") for span in spans]
    return Recorded(
        rollout(id=f"r{number}", group_id=group),
        [attempt(id=f"r{number}-1", rollout_id=f"r{number}")],
        own,
    )


def said(findings: list[Finding], level: Level) -> str:
    return " | ".join(f"{f.what} -> {f.remedy}" for f in findings if f.level is level)


def test_nothing_stored() -> None:
    assert "start a runner" in said(diagnose([]), Level.ERROR)


def test_a_healthy_run_has_no_error() -> None:
    records = [
        recorded(
            [agent_run(0, "writer"), gateway_call(1, [1], [2 + i]), tool(50), reward(99, float(i % 2))], i
        )
        for i in range(4)
    ]
    findings = diagnose(records, LearningSettings(air=AIR()))
    assert not said(findings, Level.ERROR)
    assert "4 of 4 model calls have exact token ids" in said(findings, Level.OK)
    assert "tool_succeeded 4x" in said(findings, Level.OK)
    assert "1 of 1 groups have a difference" in said(findings, Level.OK)


def test_calls_that_miss_the_gateway() -> None:
    assert "base_url" in said(diagnose([recorded([adapter_call(1), reward(2, 1.0)])]), Level.ERROR)


def test_no_call_at_all() -> None:
    assert "OPENAI_BASE_URL" in said(diagnose([recorded([reward(2, 1.0)])]), Level.ERROR)


def test_no_reward() -> None:
    assert "emit_reward" in said(diagnose([recorded([gateway_call(1, [1], [2])])]), Level.ERROR)


def test_a_selector_without_a_match_lists_the_agents() -> None:
    run = agent_run(0, "writer")
    record = recorded([run, gateway_call(1, [1], [2], parent_id=run.span_id), reward(3, 1.0)])
    findings = diagnose([record], LearningSettings(select=select_agents("editor")))
    assert "choose from: writer 1" in said(findings, Level.ERROR)


def test_groups_without_a_difference() -> None:
    records = [recorded([gateway_call(1, [1], [2]), reward(3, 0.0)], i) for i in range(4)]
    assert "no gradient -> put a worked example" in said(diagnose(records), Level.ERROR)


def test_greedy_and_cut_responses_are_warned_of() -> None:
    call = gateway_call(
        1,
        [1],
        [2],
        extra={"gen_ai.request.temperature": 0.0, "gen_ai.response.finish_reasons": ["length"]},
    )
    warnings = said(diagnose([recorded([call, reward(3, 1.0)])]), Level.WARNING)
    assert "temperature 1" in warnings
    assert "max_tokens" in warnings


def test_failed_rollouts_are_counted_by_their_error() -> None:
    broken = Recorded(
        rollout(status=RolloutStatus.FAILED),
        [attempt(status=AttemptStatus.FAILED, error="Traceback\nKeyError: 'x'")],
        [],
    )
    assert "1x with: KeyError: 'x'" in said(diagnose([broken]), Level.ERROR)


def test_rollouts_that_nobody_takes() -> None:
    waiting = Recorded(rollout(status=RolloutStatus.QUEUED), [], [])
    assert "wait for a worker" in said(diagnose([waiting]), Level.ERROR)


def test_unreadable_rewards_are_reported_not_raised() -> None:
    record = recorded([gateway_call(1, [1], [2]), reward(2, 1.0, "a"), reward(3, 1.0, "b")])
    assert "reward_weights" in said(diagnose([record]), Level.ERROR)
