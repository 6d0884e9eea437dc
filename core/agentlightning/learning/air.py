"""Automatic Intermediate Rewarding: runtime signals of an episode become small rewards for single calls.

Source: the AIR mechanism of the Agent Lightning paper (arXiv:2508.03680, section 3), which leaves the rules
open; the rules and the bound are ours. A rule reads an episode and names, for each reward, the call that
caused the signal and the span that is the evidence, or simply gives each call its reward:

    def said_please(episode: Episode) -> Mapping[LLMCall, float]:
        return {call: 0.1 for call in episode.calls if "please" in text_of(call.output)}

Shaping is bounded in total so that it cannot outweigh the final reward: an agent that farms signals gains at
most `bound`. What this is not: a checker of JSON schemas; `malformed_output` looks at the outermost level.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Final, TypeAlias, cast

from agentlightning.errors import InvalidInput
from agentlightning.reading.views import text_of
from agentlightning.references import load_function
from agentlightning.types import Episode, JsonObject, LLMCall, Signal, ToolCall, ToolStatus, Transition

BOUND: Final = 0.3  # three signals of the default size

CallKey: TypeAlias = "LLMCall | Transition | str"
"""A call, or its span id."""
Rule: TypeAlias = "Callable[[Episode], Iterable[Signal] | Mapping[Any, float]]"
"""Signals, or a reward for each `CallKey`."""


# --- rules ---------------------------------------------------------------------------------------


def tool_outcome(name: str, value: float, *statuses: ToolStatus) -> Rule:
    """A rule that rewards the call behind every tool call which ended with one of `statuses`."""

    def rule(episode: Episode) -> Iterable[Signal]:
        for tool in episode.tool_calls:
            caller = calling(episode, tool)
            if tool.status in statuses and caller is not None:
                yield Signal(name, value, caller.span_id, tool.span_id)

    return rule


def repeated_call(value: float) -> Rule:
    """A rule for a tool call with the same name and arguments as an earlier one of the episode."""

    def rule(episode: Episode) -> Iterable[Signal]:
        seen: set[str] = set()
        for tool in episode.tool_calls:
            key = json.dumps([tool.name, tool.arguments], sort_keys=True, default=str)
            caller = calling(episode, tool)
            if key in seen and caller is not None:
                yield Signal("repeated_call", value, caller.span_id, tool.span_id)
            seen.add(key)

    return rule


def empty_result(value: float) -> Rule:
    """A rule for a tool call that succeeded with nothing: None, an empty string, list or object."""

    def rule(episode: Episode) -> Iterable[Signal]:
        for tool in episode.tool_calls:
            caller = calling(episode, tool)
            if tool.status is ToolStatus.OK and tool.result in (None, "", [], {}) and caller is not None:
                yield Signal("empty_result", value, caller.span_id, tool.span_id)

    return rule


def malformed_call(value: float) -> Rule:
    """A rule for a tool call that the gateway's parser could not read."""

    def rule(episode: Episode) -> Iterable[Signal]:
        for call in episode.calls:
            if call.malformed_tool_call is not None:
                yield Signal("malformed_call", value, call.span_id, call.gateway_span_id or call.span_id)

    return rule


def malformed_output(value: float) -> Rule:
    """A rule for an answer that is not of the form that was asked for (see `has_form`)."""

    def rule(episode: Episode) -> Iterable[Signal]:
        for call in episode.calls:
            if call.malformed_tool_call is None and not _in_form(call):
                yield Signal("malformed_output", value, call.span_id, call.gateway_span_id or call.span_id)

    return rule


def truncated(value: float) -> Rule:
    """A rule for a response cut off at the token limit."""

    def rule(episode: Episode) -> Iterable[Signal]:
        for call in episode.calls:
            if call.finish_reason == "length":
                yield Signal("truncated", value, call.span_id, call.gateway_span_id or call.span_id)

    return rule


def default_rules(unit: float = 0.1, fine: float = 0.0) -> tuple[Rule, ...]:
    """Rules that need no knowledge of the task.

    `unit` is the size of one signal, `fine` what a tool call that failed costs. That is nothing by default,
    for it stands below one that worked anyway. A fine makes calling no tool at all the best that an agent can
    do that mostly fails, and it learns so within a few updates (measured: examples/credit_ablation); for an
    agent that mostly succeeds it may serve.
    """
    cost = 0.0 - fine  # not -fine, which is minus zero
    return (
        tool_outcome("tool_succeeded", unit, ToolStatus.OK),
        tool_outcome("tool_raised", cost, ToolStatus.RAISED),
        tool_outcome("unknown_tool", cost, ToolStatus.UNKNOWN_TOOL),
        tool_outcome("bad_arguments", cost, ToolStatus.BAD_ARGUMENTS),
        malformed_call(cost),
        empty_result(-unit),
        repeated_call(-2 * unit),
        malformed_output(-unit),
        truncated(-unit),
    )


def rule_named(reference: str) -> Rule:
    """A rule of the user's by name, MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises InvalidInput when there is no such function.
    """
    return load_function(reference, "AIR rule")


def has_form(text: str, schema: JsonObject) -> bool:
    """Whether a text is JSON of the schema's outermost type, with all keys that the schema requires.

    What lies deeper is not looked at: the gateway holds its own policies to the whole schema, so only an
    answer that was cut off, or another endpoint's, fails at all.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    required = schema.get("required")
    kind = schema.get("type", "object" if required else None)
    if kind == "array":
        return isinstance(value, list)
    if kind != "object":
        return True
    keys = cast("Sequence[str]", required) if isinstance(required, Sequence) else ()
    return isinstance(value, dict) and all(key in value for key in keys)


def _in_form(call: LLMCall) -> bool:
    """A call of tools, or no answer at all, is none that a form was asked of."""
    if call.response_schema is None or call.output is None or call.output.get("tool_calls"):
        return True
    return has_form(text_of(call.output), call.response_schema)


# --- what they come to ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AIR:
    """Which rules, and the most that all their rewards together may change an episode's return."""

    rules: Sequence[Rule] = field(default_factory=default_rules)
    bound: float = BOUND
    """The most that an episode's good signals may add up to, and its bad ones too, in units of the final
    reward. Where they exceed it they are scaled down together, each side by itself: good signals cannot pay
    for bad ones."""

    def __post_init__(self) -> None:
        if not self.bound >= 0:
            raise InvalidInput(f"AIR bound must be zero or more, got {self.bound}")


@dataclass(frozen=True, slots=True)
class Found:
    """The signals of one episode before the bound, and what it makes of them."""

    signals: Sequence[Signal]
    """On calls that are transitions, at the values that the rules gave."""
    elsewhere: Sequence[Signal]
    """On other calls, another model's say: nothing could learn from them."""
    good: float
    """Factor on the positive signals; below 1 where the bound acted."""
    bad: float
    """Factor on the negative ones."""

    def counted(self, signal: Signal) -> Signal:
        """A signal at its scaled value."""
        return replace(signal, value=signal.value * (self.good if signal.value > 0 else self.bad))


def find_signals(episode: Episode, air: AIR) -> Found:
    """What the rules find, in their order. Raises InvalidInput naming the rule that cannot be used."""
    trainable = {transition.span_id for transition in episode.transitions}
    found = [signal for rule in air.rules for signal in _signals_of(rule, episode)]
    signals = [signal for signal in found if signal.call_span_id in trainable]
    return Found(
        signals,
        [signal for signal in found if signal.call_span_id not in trainable],
        _scale(air.bound, sum(signal.value for signal in signals if signal.value > 0)),
        _scale(air.bound, -sum(signal.value for signal in signals if signal.value < 0)),
    )


def apply_air(episode: Episode, air: AIR) -> Episode:
    """Add the rules' rewards to the transitions of the calls that caused them.

    The returned episode holds every signal that counted, at its scaled value. Raises InvalidInput naming the
    rule that cannot be used.
    """
    found = find_signals(episode, air)
    signals = [found.counted(signal) for signal in found.signals]
    shaped = [_shaped(transition, signals) for transition in episode.transitions]
    return replace(episode, transitions=shaped, signals=[*episode.signals, *signals])


def _scale(bound: float, total: float) -> float:
    return bound / total if total > bound else 1.0


def _shaped(transition: Transition, signals: Sequence[Signal]) -> Transition:
    extra = sum(signal.value for signal in signals if signal.call_span_id == transition.span_id)
    return replace(transition, reward=transition.reward + extra) if extra else transition


def _signals_of(rule: Rule, episode: Episode) -> list[Signal]:
    name = str(getattr(rule, "__name__", rule))
    where = f"the AIR rule {name}, on rollout {episode.rollout_id},"
    try:
        found: Any = rule(episode)
        given = cast("Mapping[CallKey, float] | None", found if isinstance(found, Mapping) else None)
        signals = list(cast("Iterable[object]", found)) if given is None else _rewarded(name, given)
    except Exception as error:
        raise InvalidInput(
            f"{where} failed with {type(error).__name__}: {error}; a rule returns signals, or a reward for "
            "each call that it names"
        ) from error
    return [_checked(signal, where, episode) for signal in signals]


def _rewarded(name: str, rewards: Mapping[CallKey, float]) -> list[object]:
    """The signals of a rule that gives rewards only: the call is the evidence."""
    spans = [key if isinstance(key, str) else key.span_id for key in rewards]
    return [Signal(name, float(value), s, s) for s, value in zip(spans, rewards.values(), strict=True)]


def _checked(signal: object, where: str, episode: Episode) -> Signal:
    if not isinstance(signal, Signal):
        raise InvalidInput(f"{where} gave a {type(signal).__name__}, not a Signal")
    value: object = signal.value
    if not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidInput(f"{where} gave the reward {value!r}, which is not a finite number")
    for call in episode.calls:
        if signal.call_span_id in (call.span_id, call.gateway_span_id):
            return replace(signal, call_span_id=call.span_id)
    if any(signal.call_span_id == transition.span_id for transition in episode.transitions):
        return signal
    raise InvalidInput(f"{where} rewards {signal.call_span_id!r}, which is no call of the episode")


# --- who asked for a tool call -------------------------------------------------------------------


def calling(episode: Episode, tool: ToolCall) -> LLMCall | None:
    """The model call that asked for a tool call: by tool call id, else the last one that ended before it."""
    if tool.call_id is not None:
        for call in reversed(episode.calls):
            if tool.call_id in _requested_ids(call):
                return call
    earlier = [call for call in episode.calls if call.end_ns <= tool.start_ns]
    own = [call for call in earlier if tool.agent_name in (None, call.agent_name)]
    return max(own or earlier, key=lambda call: call.end_ns, default=None)


def _requested_ids(call: LLMCall) -> set[str]:
    requested = (call.output or {}).get("tool_calls")
    if not isinstance(requested, Sequence):
        return set()
    return {str(request["id"]) for request in requested if isinstance(request, dict) and "id" in request}
