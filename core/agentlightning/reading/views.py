"""Spans of one attempt -> typed views: model calls, tool calls, agent runs, rewards.

What a span says is for `dialects` to know, which spans say the same for `duplicates`; this module puts the
records together. It does not know policies or training. Spans it cannot place are counted, not dropped
silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from agentlightning import semconv
from agentlightning.reading import attributes as read
from agentlightning.reading.dialects import Kind, is_own, recognise
from agentlightning.reading.duplicates import Writers, distinct_agents, distinct_calls, distinct_tools
from agentlightning.types import AgentRun, LLMCall, Message, Reward, Span, ToolCall
from agentlightning.wire import FLOAT32_MAX


@dataclass(frozen=True, slots=True)
class TraceView:
    """Typed views of one attempt's spans. Gateway and adapter calls are still apart; see `join_calls`."""

    adapter_calls: Sequence[LLMCall]
    gateway_calls: Sequence[LLMCall]
    tool_calls: Sequence[ToolCall]
    agent_runs: Sequence[AgentRun]
    rewards: Sequence[Reward]
    parents: Mapping[str, str | None]
    """Parent span id of every span, unplaced ones included."""
    unplaced: int
    merged: Mapping[str, str] = field(default_factory=dict[str, str])
    """Span ids of records that said what another one says, to that one's."""
    borders: frozenset[str] = frozenset()
    """Span ids of agent runs and tool calls."""


def read_trace(spans: Sequence[Span]) -> TraceView:
    """Read spans in any order; a span sent twice counts once."""
    unique = {span.span_id: span for span in spans}
    ordered = sorted(unique.values(), key=lambda span: (span.start_ns, span.span_id))
    adapter: list[LLMCall] = []
    gateway: list[LLMCall] = []
    tools: list[ToolCall] = []
    agents: list[AgentRun] = []
    rewards: list[Reward] = []
    unplaced = 0
    for span in ordered:
        if semconv.REWARD_VALUE in span.attributes:
            rewards += _reward(span)
            continue
        match recognise(span):
            case (dialect, Kind.LLM):
                (gateway if span.scope == semconv.SCOPE_GATEWAY else adapter).append(dialect.llm(span))
            case (dialect, Kind.TOOL):
                tools.append(dialect.tool(span))
            case (dialect, Kind.AGENT):
                agents.append(dialect.agent(span))
            case _:
                unplaced += 1
    writers = _writers(ordered, [*tools, *agents])
    adapter, merged = distinct_calls(adapter, writers)
    tools, merged_tools = distinct_tools(tools, writers)
    runs, merged_runs = distinct_agents(agents, writers)
    merged |= merged_tools | merged_runs
    names = {run.span_id: run.name for run in agents}
    return TraceView(
        adapter,
        gateway,
        [_with_agent(tool, names, writers.parents) for tool in tools],
        runs,
        [replace(reward, target=merged.get(reward.target or "", reward.target)) for reward in rewards],
        writers.parents,
        unplaced,
        merged,
        writers.borders,
    )


def _writers(spans: Sequence[Span], borders: Sequence[ToolCall | AgentRun]) -> Writers:
    return Writers(
        scopes={span.span_id: span.scope for span in spans},
        own=frozenset(span.span_id for span in spans if is_own(span)),
        parents={span.span_id: span.parent_id for span in spans},
        borders=frozenset(record.span_id for record in borders),
    )


def enclosing_agent(
    span_id: str | None, names: Mapping[str, str], parents: Mapping[str, str | None]
) -> str | None:
    """Name of the nearest agent run at or above a span, None when there is none."""
    seen: set[str] = set()
    while span_id is not None and span_id not in seen:
        if span_id in names:
            return names[span_id]
        seen.add(span_id)
        span_id = parents.get(span_id)
    return None


def _with_agent(tool: ToolCall, names: Mapping[str, str], parents: Mapping[str, str | None]) -> ToolCall:
    if tool.agent_name is not None:
        return tool
    return replace(tool, agent_name=enclosing_agent(tool.parent_id, names, parents))


def _reward(span: Span) -> list[Reward]:
    value = read.number(span.attributes, semconv.REWARD_VALUE)
    if value is None or not abs(value) <= FLOAT32_MAX:
        return []
    return [
        Reward(
            value=value,
            name=read.text(span.attributes, semconv.REWARD_NAME) or "reward",
            target=read.text(span.attributes, semconv.REWARD_TARGET),
            time_ns=span.start_ns,
            span_id=span.span_id,
        )
    ]


def text_of(message: Message | None) -> str:
    """The text of a chat message; parts that are not text are left out."""
    content = message.get("content") if message else None
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(t for t in texts if isinstance(t, str))
    return ""
