"""AIR: which signals its rules find on which calls, what the bound leaves of them, rules of the user."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.spans import adapter_call, attempt, gateway_call, reward, rollout, tool

from agentlightning import semconv
from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.errors import InvalidInput
from agentlightning.learning import AIR, Estimator, Normalise, Rule, apply_air, rule_named
from agentlightning.learning.air import (
    default_rules,
    empty_result,
    find_signals,
    has_form,
    malformed_call,
    malformed_output,
    repeated_call,
    tool_outcome,
    truncated,
)
from agentlightning.learning.explaining import explain, rule_totals
from agentlightning.named_learning import NamedLearning
from agentlightning.reading import read_episode
from agentlightning.reading.views import text_of
from agentlightning.types import Episode, JsonObject, LLMCall, Message, Signal, Span, ToolStatus, Transition


def requesting(call_id: str) -> Message:
    call = {"id": call_id, "type": "function", "function": {"name": "calculator", "arguments": "{}"}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def read(spans: list[Span]) -> Episode:
    return read_episode(rollout(), attempt(), [*spans, reward(10_000, 1.0)])


def test_a_tool_outcome_is_paid_to_the_call_that_asked_for_it() -> None:
    first = gateway_call(100, [1], [2], output=requesting("c1"))
    second = gateway_call(200, [1, 2], [3], output=requesting("c2"))
    outcome = tool(300, call_id="c1")  # ran late: the id counts, not the time
    shaped = apply_air(read([first, second, outcome]), AIR([tool_outcome("ok", 0.1, ToolStatus.OK)], bound=1))
    assert [t.reward for t in shaped.transitions] == pytest.approx([0.1, 0.0])
    assert [(s.rule, s.evidence_span_id) for s in shaped.signals] == [("ok", outcome.span_id)]


def test_without_an_id_the_last_call_before_the_tool_caused_it() -> None:
    calls = [gateway_call(100, [1], [2]), gateway_call(200, [1, 2], [3])]
    shaped = apply_air(read([*calls, tool(250)]), AIR([tool_outcome("ok", 0.1, ToolStatus.OK)], bound=1))
    assert [t.reward for t in shaped.transitions] == pytest.approx([0.0, 0.1])


def test_shaping_is_bounded_in_total() -> None:
    spans = [gateway_call(100, [1], [2])] + [tool(200 + i, arguments=f"[{i}]") for i in range(50)]
    shaped = apply_air(read(spans), AIR([tool_outcome("ok", 0.1, ToolStatus.OK)], bound=0.3))
    assert sum(t.reward for t in shaped.transitions) == pytest.approx(0.3)
    assert sum(s.value for s in shaped.signals) == pytest.approx(0.3)


def test_the_other_rules_find_their_signals() -> None:
    asked = gateway_call(
        100,
        [1],
        [2],
        extra={
            "agentlightning.malformed_tool_call": "<tool_call>{",
            "gen_ai.response.finish_reasons": ["length"],
        },
    )
    spans = [asked, tool(200), tool(300), tool(400, result="")]
    rules = [repeated_call(-1), empty_result(-2), malformed_call(-4), truncated(-8), malformed_output(-16)]
    shaped = apply_air(read(spans), AIR(rules, bound=100))
    assert sorted(s.rule for s in shaped.signals) == [
        "empty_result",
        "malformed_call",
        "repeated_call",
        "repeated_call",
        "truncated",
    ]
    assert shaped.transitions[0].reward == -16


def test_a_failed_tool_call_costs_nothing_unless_it_is_to() -> None:
    asked = gateway_call(100, [1], [2], extra={"agentlightning.malformed_tool_call": "<tool_call>{"})
    failures = (ToolStatus.RAISED, ToolStatus.UNKNOWN_TOOL, ToolStatus.BAD_ARGUMENTS)
    played = read([asked, *(tool(200 + i, arguments=f"[{i}]", status=s) for i, s in enumerate(failures))])
    free, fined = (
        apply_air(played, AIR(rules, bound=1)) for rules in (default_rules(), default_rules(fine=0.1))
    )
    assert [s.rule for s in free.signals] == [
        "tool_raised",
        "unknown_tool",
        "bad_arguments",
        "malformed_call",
    ]
    assert [str(s.value) for s in free.signals] == ["0.0"] * 4
    assert fined.transitions[0].reward == pytest.approx(-0.4)


def test_intermediate_rewards_reach_the_advantages() -> None:
    """Two rollouts fail alike; one of them called its tool well. Without AIR there is nothing to learn."""
    good = read_episode(rollout(), attempt(), [gateway_call(1, [1], [2]), tool(50), reward(99, 0.0)])
    bad = read_episode(rollout(id="r2"), attempt(), [gateway_call(1, [1], [3]), reward(99, 0.0)])
    air = AIR([tool_outcome("ok", 0.1, ToolStatus.OK)])
    shaped = [apply_air(e, air) for e in (good, bad)]
    assert not make_batch([good, bad], LearningSettings()).advantages.any()
    advantages = make_batch(shaped, LearningSettings()).advantages
    assert advantages[1] > 0 > advantages[3]


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(InvalidInput):
        AIR(bound=-1)


# --- structured output ---------------------------------------------------------------------------

ANSWER: JsonObject = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("text", "schema", "fits"),
    [
        ('{"a": 1}', ANSWER, True),
        ('{"b": 1}', ANSWER, False),
        ('{"a": ', ANSWER, False),
        ("[1]", ANSWER, False),
        ("", ANSWER, False),
        ('{"a": "what lies deeper is not looked at"}', ANSWER, True),
        ('{"b": 1}', {"required": ["a"]}, False),
        ("{}", {"type": "object"}, True),
        ("[1]", {"type": "array"}, True),
        ("{}", {"type": "array"}, False),
        ("3", {"type": "integer"}, True),
        ("[" * 100_000, {"type": "array"}, False),
    ],
)
def test_the_form_of_an_answer_is_its_outermost_level(text: str, schema: JsonObject, fits: bool) -> None:
    assert has_form(text, schema) == fits


def structured(text: str | None, tool_calls: Any = None, **extra: Any) -> Episode:
    output: dict[str, Any] = {"role": "assistant", "content": text}
    if tool_calls:
        output = {**output, "tool_calls": tool_calls}
    asked = {semconv.OUTPUT_TYPE: "json", semconv.RESPONSE_SCHEMA: json.dumps(ANSWER), **extra}
    return read([gateway_call(1, [1], [2], output=output, extra=asked)])


def test_an_answer_that_is_not_of_the_form_that_was_asked_for_is_malformed() -> None:
    rules = AIR([malformed_output(-1)], bound=100)
    assert not apply_air(structured('{"a": 1}'), rules).signals
    assert [s.rule for s in apply_air(structured('{"a": '), rules).signals] == ["malformed_output"]
    asking = requesting("c1")["tool_calls"]
    assert not apply_air(structured(None, asking), rules).signals  # a call of a tool is no answer
    assert apply_air(structured("[]", **{semconv.RESPONSE_SCHEMA: "?"}), rules).signals  # json_object


# --- rules of the user's -------------------------------------------------------------------------


def said_ok(episode: Episode) -> Mapping[LLMCall, float]:
    return {call: 0.25 for call in episode.calls if text_of(call.output) == "ok"}


def short(episode: Episode) -> Mapping[Transition, float]:
    return {t: np.float32(0.5) for t in episode.transitions if len(t.response_ids) == 1}  # type: ignore[misc]


def by_id(episode: Episode) -> Mapping[str, float]:
    return {episode.calls[0].span_id: -0.125}


def as_signals(episode: Episode) -> Iterable[Signal]:
    call = episode.calls[1]
    yield Signal("mine", 1, call.gateway_span_id or "", call.span_id)


@pytest.mark.parametrize(
    ("rule", "rewards"),
    [(said_ok, [0.25, 0.25]), (short, [0.5, 0.0]), (by_id, [-0.125, 0.0]), (as_signals, [0.0, 1.0])],
)
def test_a_rule_is_a_function_that_gives_calls_rewards(rule: Rule, rewards: Sequence[float]) -> None:
    caller = adapter_call(90)
    spans = [caller, gateway_call(100, [1], [2], parent_id=caller.span_id)]
    shaped = apply_air(read([*spans, gateway_call(200, [1, 2], [3, 4])]), AIR([rule], bound=10))
    assert [t.reward for t in shaped.transitions] == rewards


def test_a_rule_in_the_name_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my_rules.py"
    path.write_text("def last(episode):\n    return {episode.calls[-1]: 0.1}\n")
    shaped = apply_air(read([gateway_call(1, [1], [2])]), AIR([rule_named(f"{path}:last")]))
    assert [(s.rule, s.value) for s in shaped.signals] == [("last", 0.1)]


def nothing(_: Episode) -> Any:
    return None


def raising(episode: Episode) -> Iterable[Signal]:
    yield Signal("fine", 0.1, episode.calls[0].span_id, episode.calls[0].span_id)
    raise KeyError("oops")


BROKEN: list[tuple[Callable[[Episode], Any], str]] = [
    (raising, "the AIR rule raising, on rollout r1, failed with KeyError: 'oops'"),
    (nothing, "the AIR rule nothing, .* failed with TypeError"),
    (lambda e: {"nowhere": 0.1}, "the AIR rule <lambda>, .* rewards 'nowhere', which is no call"),
    (lambda e: {e.calls[0]: float("nan")}, "gave the reward nan, which is not a finite number"),
    (lambda e: {e.calls[0]: "much"}, "failed with ValueError"),
    (lambda e: {3: 0.1}, "failed with AttributeError"),
    (lambda e: [0.1], "gave a float, not a Signal"),
    (lambda e: [Signal("x", None, e.calls[0].span_id, "")], "gave the reward None"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("rule", "sentence"), BROKEN)
def test_a_rule_that_cannot_be_used_is_named(rule: Callable[[Episode], Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        apply_air(read([gateway_call(1, [1], [2])]), AIR([rule]))


def test_signals_on_calls_of_other_models_count_for_nothing() -> None:
    other = adapter_call(50)
    played = read([gateway_call(1, [1], [2]), other])
    found = find_signals(played, AIR([lambda e: dict.fromkeys(e.calls, 0.1)]))
    assert [s.call_span_id for s in found.elsewhere] == [other.span_id]
    assert len(found.signals) == 1


@given(st.lists(st.integers(-100, 100), max_size=12), st.sampled_from([0.0, 0.1, 1.0]))
def test_neither_side_ever_exceeds_the_bound(values: list[int], bound: float) -> None:
    def rule(episode: Episode) -> Iterable[Signal]:
        call = episode.calls[0].span_id
        return [Signal("x", value / 100, call, call) for value in values]

    signals = apply_air(read([gateway_call(1, [1], [2])]), AIR([rule], bound)).signals
    assert sum(s.value for s in signals if s.value > 0) <= bound + 1e-9
    assert sum(s.value for s in signals if s.value < 0) >= -bound - 1e-9
    assert [np.sign(s.value) for s in signals] == [np.sign(v) if bound else 0 for v in values]


# --- explanations --------------------------------------------------------------------------------


def test_an_explanation_has_every_call_and_what_the_bound_left() -> None:
    first = gateway_call(100, [1], [2], output=requesting("c1"))
    failed = tool(150, call_id="c1", status=ToolStatus.RAISED)
    calls = [tool(300 + i, arguments=f"[{i}]") for i in range(4)]
    played = read([first, failed, gateway_call(200, [1, 2], [3]), *calls, adapter_call(900)])
    fining = AIR(default_rules(fine=0.1))
    explained = explain(played, fining)
    one, two, other = explained.calls
    assert (one.tools, [(s.rule, s.value, s.counted) for s in one.signals]) == (
        ["calculator"],
        [("tool_raised", -0.1, -0.1)],
    )
    evidence = one.signals[0].evidence
    assert (evidence.span_id, evidence.tool, evidence.status) == (failed.span_id, "calculator", "raised")
    assert [s.value for s in two.signals] == [0.1] * 4
    assert two.total == pytest.approx(0.3)
    assert (explained.good, explained.bad) == pytest.approx((0.75, 1.0))
    assert explained.total == pytest.approx(sum(t.reward for t in apply_air(played, fining).transitions))
    assert not other.trainable
    totals = rule_totals([explained, explained])
    assert list(totals) == ["tool_succeeded", "tool_raised"]
    assert (totals["tool_succeeded"].signals, totals["tool_succeeded"].episodes) == (8, 1)
    assert totals["tool_succeeded"].counted == pytest.approx(0.6)


# --- settings in words ---------------------------------------------------------------------------


def test_settings_in_words_survive_a_file() -> None:
    named = NamedLearning(
        air_rules=["m:f"], agents=("a",), estimator=Estimator.RLOO, normalise=Normalise.TOKEN, by_agent=True
    )
    again = NamedLearning.from_json(json.loads(json.dumps({**named.to_json(), "model": "m", "seed": 3})))
    assert again.to_json() == named.to_json()
    assert NamedLearning.from_json({}) == NamedLearning()
    with pytest.raises(InvalidInput, match="luck"):
        NamedLearning.from_json({"estimator": "luck"})


def test_settings_in_words_become_functions() -> None:
    mine = f"{__name__}:by_id" if __name__.startswith("tests.") else f"{__file__}:by_id"
    assert NamedLearning(air=False).settings().air is None
    own = NamedLearning(air=False, air_rules=[mine], air_bound=0.5).settings().air
    assert own is not None
    assert (len(own.rules), own.bound) == (1, 0.5)
    both = NamedLearning(air_rules=[mine], step_groups=0.5).settings()
    assert both.air is not None
    assert len(both.air.rules) == 1 + len(AIR().rules)
    assert both.steps is not None
    assert both.steps.weight == 0.5
    with pytest.raises(InvalidInput, match="names no AIR rule"):
        NamedLearning(air_rules=["nothing"]).settings()
