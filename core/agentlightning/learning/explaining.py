"""Why AIR gave what it gave: each call of an episode with its signals, their evidence, and the bound.

What this is not: printing. It explains an episode as it was read, before AIR changed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agentlightning.learning.air import AIR, Found, find_signals
from agentlightning.reading.views import text_of
from agentlightning.types import Episode, LLMCall, Message, Signal, ToolStatus


@dataclass(frozen=True, slots=True)
class Evidence:
    """The span that a signal rests on: a tool call with its outcome, or the model call itself."""

    span_id: str
    tool: str | None = None
    status: ToolStatus | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """One signal: what the rule gave and what of it counted."""

    rule: str
    value: float
    counted: float
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class ExplainedCall:
    """One model call, in call order."""

    span_id: str
    agent_name: str | None
    said: str
    tools: Sequence[str]
    """Names of the tools that it asked for."""
    trainable: bool
    """Whether it is a call of a policy, with token ids; signals on other calls count for nothing."""
    signals: Sequence[Given]

    @property
    def total(self) -> float:
        """What it gains or loses."""
        return sum(signal.counted for signal in self.signals)


@dataclass(frozen=True, slots=True)
class Explanation:
    """One episode."""

    rollout_id: str
    final_reward: float | None
    bound: float
    good: float
    """Factor of the bound on positive signals; 1 where it did not act."""
    bad: float
    calls: Sequence[ExplainedCall]

    @property
    def total(self) -> float:
        """What all signals change the episode's return by."""
        return sum(call.total for call in self.calls)


@dataclass(frozen=True, slots=True)
class RuleTotal:
    """What one rule came to over many episodes."""

    signals: int
    episodes: int
    value: float
    """Sum of what the rule gave."""
    counted: float
    """Sum of what was left of it."""


def explain(episode: Episode, air: AIR) -> Explanation:
    """Every call of an episode with its signals."""
    found = find_signals(episode, air)
    by_call: dict[str, list[Given]] = {}
    for signal, counted in _all(found):
        given = Given(signal.rule, signal.value, counted, _evidence(signal, episode))
        by_call.setdefault(signal.call_span_id, []).append(given)
    trainable = {transition.span_id for transition in episode.transitions}
    calls = {call.span_id: call for call in reversed(episode.calls)}  # the first of several choices
    ordered = [calls[span_id] for span_id in dict.fromkeys(call.span_id for call in episode.calls)]
    return Explanation(
        episode.rollout_id,
        episode.final_reward,
        air.bound,
        found.good,
        found.bad,
        [_explained(call, call.span_id in trainable, by_call.get(call.span_id, ())) for call in ordered],
    )


def rule_totals(explanations: Iterable[Explanation]) -> dict[str, RuleTotal]:
    """By rule, those that were found most often first."""
    given: dict[str, list[tuple[str, Given]]] = {}
    for explanation in explanations:
        for call in explanation.calls:
            for signal in call.signals:
                given.setdefault(signal.rule, []).append((explanation.rollout_id, signal))
    totals = {
        rule: RuleTotal(
            len(signals),
            len({rollout_id for rollout_id, _ in signals}),
            sum(signal.value for _, signal in signals),
            sum(signal.counted for _, signal in signals),
        )
        for rule, signals in given.items()
    }
    return dict(sorted(totals.items(), key=lambda item: -item[1].signals))


def _all(found: Found) -> Iterable[tuple[Signal, float]]:
    yield from ((signal, found.counted(signal).value) for signal in found.signals)
    yield from ((signal, 0.0) for signal in found.elsewhere)


def _evidence(signal: Signal, episode: Episode) -> Evidence:
    for tool in episode.tool_calls:
        if tool.span_id == signal.evidence_span_id:
            return Evidence(tool.span_id, tool.name, tool.status, tool.error)
    return Evidence(signal.evidence_span_id)


def _explained(call: LLMCall, trainable: bool, signals: Sequence[Given]) -> ExplainedCall:
    said = text_of(call.output)
    return ExplainedCall(call.span_id, call.agent_name, said, _tools(call.output), trainable, signals)


def _tools(output: Message | None) -> list[str]:
    requested = (output or {}).get("tool_calls")
    if not isinstance(requested, Sequence):
        return []
    functions = [request.get("function") for request in requested if isinstance(request, Mapping)]
    return [str(function.get("name")) for function in functions if isinstance(function, Mapping)]
