"""Two instrumentations that saw one thing happen: one record of it.

An application may have several: of its framework and of the OpenAI client below it, or a foreign one beside
our adapter. Two model calls are one when

- one ran inside the other, no agent or tool between them, and both sent the same request or got the same
  response; or
- different instrumentations wrote them, their times overlap, and both have the same response id, or the same
  request and answer where one has no id.

Two tool calls, or two runs of an agent, are one when different instrumentations wrote them, their times
overlap, they have the same name, and nothing that both know (call id, arguments) differs. So are two runs of
one agent directly inside each other, unless both are ours.
Ours is kept, else the outer one, because it knows who asked; from the other it takes only what it lacks, and
a failure, which not every instrumentation notices. Sent-again requests inside one outer call are one call.
Invariant: what remains is untouched in order, and every id that went away points to the record that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

from agentlightning.reading.comparable import arguments_key, message_key, request_key
from agentlightning.types import AgentRun, Json, LLMCall, ToolCall, ToolStatus


class _Timed(Protocol):
    @property
    def span_id(self) -> str: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...


T = TypeVar("T", bound=_Timed)


@dataclass(frozen=True, slots=True)
class Writers:
    """Which instrumentation wrote a span, whether it is ours, and what each span ran inside of."""

    scopes: Mapping[str, str]
    own: frozenset[str]
    parents: Mapping[str, str | None]
    borders: frozenset[str]
    """Agents' runs and tool calls: what happens below one is no part of what happens above it."""

    def inside(self, inner: str, outer: str) -> bool:
        """Whether a span ran inside another, no border between them."""
        seen: set[str] = set()
        span_id = self.parents.get(inner)
        while span_id is not None and span_id not in seen:
            if span_id == outer or span_id in self.borders:
                return span_id == outer
            seen.add(span_id)
            span_id = self.parents.get(span_id)
        return False

    def scope(self, span_id: str) -> str:
        """The instrumentation that wrote a span."""
        return self.scopes.get(span_id, "")

    def elsewhere(self, span_id: str, group: _Group[Any]) -> bool:
        """Whether the span's instrumentation has no part in the group. Ours never see each other's calls."""
        both_ours = span_id in self.own and group.kept.span_id in self.own
        return self.scope(span_id) not in group.scopes and not both_ours


@dataclass(slots=True)
class _Group(Generic[T]):
    kept: T
    scopes: set[str]
    others: list[T]
    end_ns: int


def distinct_calls(calls: Sequence[LLMCall], writers: Writers) -> tuple[list[LLMCall], dict[str, str]]:
    """One record of each model call, and where those that went away have gone."""
    by_id = {call.span_id: call for call in calls}

    @cache
    def asked(span_id: str) -> str:
        return request_key(by_id[span_id].messages)

    def same(a: LLMCall, b: LLMCall, elsewhere: bool) -> bool:
        if writers.inside(b.span_id, a.span_id):
            return not a.messages or not b.messages or asked(a.span_id) == asked(b.span_id) or _answered(a, b)
        if not elsewhere:
            return False
        if a.response_id and b.response_id:
            return a.response_id == b.response_id
        return bool(a.messages) and asked(a.span_id) == asked(b.span_id) and _same_answer(a, b)

    return _distinct(calls, same, _filled_call, writers)


def distinct_tools(tools: Sequence[ToolCall], writers: Writers) -> tuple[list[ToolCall], dict[str, str]]:
    """One record of each tool call, and where those that went away have gone."""

    def same(a: ToolCall, b: ToolCall, elsewhere: bool) -> bool:
        if not elsewhere or a.name != b.name:
            return False
        if a.call_id and b.call_id:
            return a.call_id == b.call_id
        known = isinstance(a.arguments, Mapping) and isinstance(b.arguments, Mapping)
        return not known or arguments_key(a.arguments) == arguments_key(b.arguments)

    return _distinct(tools, same, _filled_tool, writers)


def distinct_agents(runs: Sequence[AgentRun], writers: Writers) -> tuple[list[AgentRun], dict[str, str]]:
    """One record of each agent's run, and where those that went away have gone."""

    def same(a: AgentRun, b: AgentRun, elsewhere: bool) -> bool:
        if a.span_id in writers.own and b.span_id in writers.own:
            return False  # an agent that came to itself again, by handoffs or as its own tool
        return a.name == b.name and (elsewhere or writers.inside(b.span_id, a.span_id))

    return _distinct(runs, same, lambda kept, other: replace(kept, error=kept.error or other.error), writers)


def _distinct(
    items: Sequence[T], same: Callable[[T, T, bool], bool], fill: Callable[[T, T], T], writers: Writers
) -> tuple[list[T], dict[str, str]]:
    """`items` in order of time. Compared only with what was still going on when they started."""
    groups: list[_Group[T]] = []
    going_on: list[_Group[T]] = []
    for item in items:
        going_on = [group for group in going_on if group.end_ns >= item.start_ns]
        group = next((g for g in going_on if same(g.kept, item, writers.elsewhere(item.span_id, g))), None)
        if group is None:
            group = _Group(item, {writers.scope(item.span_id)}, [], item.end_ns)
            groups.append(group)
            going_on.append(group)
        else:
            _add(group, item, writers)
    gone = {other.span_id: group.kept.span_id for group in groups for other in group.others}
    return [_filled(group, fill) for group in groups], gone


def _add(group: _Group[T], item: T, writers: Writers) -> None:
    group.scopes.add(writers.scope(item.span_id))
    group.end_ns = max(group.end_ns, item.end_ns)
    ours_is_late = item.span_id in writers.own and group.kept.span_id not in writers.own
    group.kept, other = (item, group.kept) if ours_is_late else (group.kept, item)
    group.others.append(other)


def _filled(group: _Group[T], fill: Callable[[T, T], T]) -> T:
    kept = group.kept
    for other in reversed(group.others):  # of requests sent again, the last is the one that was answered
        kept = fill(kept, other)
    return kept


def _answered(a: LLMCall, b: LLMCall) -> bool:
    """Whether one response answered both, for frameworks that trace another request than they send."""
    if a.response_id and b.response_id:
        return a.response_id == b.response_id
    return a.output is not None and b.output is not None and _same_answer(a, b)


def _same_answer(a: LLMCall, b: LLMCall) -> bool:
    return a.output is None or b.output is None or message_key(a.output) == message_key(b.output)


def _filled_call(kept: LLMCall, other: LLMCall) -> LLMCall:
    return replace(
        kept,
        messages=kept.messages or other.messages,
        output=kept.output or other.output,
        tools=kept.tools or other.tools,
        agent_name=kept.agent_name or other.agent_name,
        node_path=kept.node_path or other.node_path,
        model=kept.model or other.model,
        response_id=kept.response_id or other.response_id,
        finish_reason=kept.finish_reason or other.finish_reason,
        input_tokens=kept.input_tokens or other.input_tokens,
        output_tokens=kept.output_tokens or other.output_tokens,
    )


def _says_more(one: Json, other: Json) -> bool:
    """Some writers reduce arguments that did not validate to a text."""
    return isinstance(one, Mapping) or not (isinstance(other, Mapping) or one is None)


def _filled_tool(kept: ToolCall, other: ToolCall) -> ToolCall:
    failed = other if kept.status is ToolStatus.OK else kept
    return replace(
        kept,
        arguments=kept.arguments if _says_more(kept.arguments, other.arguments) else other.arguments,
        result=other.result if kept.result is None else kept.result,
        status=failed.status,
        error=failed.error,
        call_id=kept.call_id or other.call_id,
        agent_name=kept.agent_name or other.agent_name,
    )
