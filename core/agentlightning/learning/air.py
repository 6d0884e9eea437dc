"""Automatic Intermediate Rewarding: runtime signals of an episode become small rewards for single calls.

Source: the AIR mechanism of the Agent Lightning paper (arXiv:2508.03680, section 3), which leaves the rules
open; the rules and the bound are ours. A rule reads an episode and names, for each reward, the call that
caused the signal and the span that is the evidence. Shaping is bounded in total so that it cannot outweigh
the final reward: an agent that farms signals gains at most `bound`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from agentlightning.errors import InvalidInput
from agentlightning.types import Episode, LLMCall, Signal, ToolCall, ToolStatus, Transition

Rule: TypeAlias = "Callable[[Episode], Iterable[Signal]]"


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


def malformed_output(value: float) -> Rule:
    """A rule for a response whose tool call the gateway's parser could not read."""

    def rule(episode: Episode) -> Iterable[Signal]:
        for call in episode.calls:
            if call.malformed_tool_call is not None:
                yield Signal("malformed_output", value, call.span_id, call.gateway_span_id or call.span_id)

    return rule


def truncated(value: float) -> Rule:
    """A rule for a response cut off at the token limit."""

    def rule(episode: Episode) -> Iterable[Signal]:
        for call in episode.calls:
            if call.finish_reason == "length":
                yield Signal("truncated", value, call.span_id, call.gateway_span_id or call.span_id)

    return rule


def default_rules(unit: float = 0.1) -> tuple[Rule, ...]:
    """Rules that need no knowledge of the task. `unit` is the size of one signal."""
    return (
        tool_outcome("tool_succeeded", unit, ToolStatus.OK),
        tool_outcome("tool_raised", -unit, ToolStatus.RAISED),
        tool_outcome("unknown_tool", -unit, ToolStatus.UNKNOWN_TOOL),
        tool_outcome("bad_arguments", -unit, ToolStatus.BAD_ARGUMENTS),
        empty_result(-unit),
        repeated_call(-2 * unit),
        malformed_output(-unit),
        truncated(-unit),
    )


@dataclass(frozen=True, slots=True)
class AIR:
    """Which rules, and the most that all their rewards together may change an episode's return."""

    rules: Sequence[Rule] = field(default_factory=default_rules)
    bound: float = 0.3
    """The most that an episode's good signals may add up to, and its bad ones too, in units of the final
    reward. Where they exceed it they are scaled down together, each side by itself: good signals cannot pay
    for bad ones."""

    def __post_init__(self) -> None:
        if not self.bound >= 0:
            raise InvalidInput(f"AIR bound must be zero or more, got {self.bound}")


def apply_air(episode: Episode, air: AIR) -> Episode:
    """Add the rules' rewards to the transitions of the calls that caused them.

    Signals on calls that are no transition (another model's call) are left out: nothing could learn from
    them. The returned episode holds every signal that counted, at its scaled value.
    """
    trainable = {transition.span_id for transition in episode.transitions}
    signals = [signal for rule in air.rules for signal in rule(episode) if signal.call_span_id in trainable]
    good = _scale(air.bound, sum(signal.value for signal in signals if signal.value > 0))
    bad = _scale(air.bound, -sum(signal.value for signal in signals if signal.value < 0))
    signals = [
        replace(signal, value=signal.value * (good if signal.value > 0 else bad)) for signal in signals
    ]
    shaped = [_shaped(transition, signals) for transition in episode.transitions]
    return replace(episode, transitions=shaped, signals=[*episode.signals, *signals])


def _scale(bound: float, total: float) -> float:
    return bound / total if total > bound else 1.0


def _shaped(transition: Transition, signals: Sequence[Signal]) -> Transition:
    extra = sum(signal.value for signal in signals if signal.call_span_id == transition.span_id)
    return replace(transition, reward=transition.reward + extra) if extra else transition


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
