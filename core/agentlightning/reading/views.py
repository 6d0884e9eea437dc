"""Spans of one attempt -> typed views: model calls, tool calls, agent runs, rewards.

This module knows attribute names (the newest GenAI conventions and our own); it does not know policies or
training. Spans it cannot place are counted, not dropped silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from agentlightning import semconv
from agentlightning.messages import messages_from_json
from agentlightning.reading import attributes as read
from agentlightning.types import (
    AgentRun,
    Attributes,
    Json,
    JsonObject,
    LLMCall,
    Message,
    Reward,
    Span,
    SpanStatus,
    ToolCall,
    ToolStatus,
)


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
        operation = read.text(span.attributes, semconv.OPERATION)
        if semconv.REWARD_VALUE in span.attributes:
            rewards += _reward(span)
        elif operation == semconv.OP_CHAT:
            (gateway if span.scope == semconv.SCOPE_GATEWAY else adapter).append(_llm_call(span))
        elif operation == semconv.OP_TOOL:
            tools.append(_tool_call(span))
        elif operation == semconv.OP_AGENT:
            agents.append(_agent_run(span))
        else:
            unplaced += 1
    names = {run.span_id: run.name for run in agents}
    parents = {span.span_id: span.parent_id for span in ordered}
    tools = [_with_agent(tool, names, parents) for tool in tools]
    return TraceView(adapter, gateway, tools, agents, rewards, parents, unplaced)


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


def _llm_call(span: Span) -> LLMCall:
    a = span.attributes
    output = _messages(a, semconv.OUTPUT_MESSAGES)
    is_gateway = span.scope == semconv.SCOPE_GATEWAY
    temperature = read.number(a, semconv.REQUEST_TEMPERATURE)
    return LLMCall(
        span_id=span.span_id,
        gateway_span_id=span.span_id if is_gateway else None,
        parent_id=span.parent_id,
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        messages=_messages(a, semconv.INPUT_MESSAGES),
        output=output[0] if output else None,
        tools=_tool_definitions(read.parsed(a, semconv.TOOL_DEFINITIONS)),
        agent_name=read.text(a, semconv.AGENT_NAME),
        node_path=read.text(a, semconv.NODE_PATH),
        model=read.text(a, semconv.RESPONSE_MODEL, semconv.REQUEST_MODEL),
        response_id=read.text(a, semconv.RESPONSE_ID),
        finish_reason=read.first_text(a, semconv.RESPONSE_FINISH_REASONS),
        prompt_ids=read.token_ids(a, semconv.PROMPT_IDS),
        response_ids=read.token_ids(a, semconv.RESPONSE_IDS),
        logprobs=read.logprobs(a, semconv.RESPONSE_LOGPROBS),
        temperature=1.0 if temperature is None else temperature,
        policy=read.text(a, semconv.POLICY_NAME),
        policy_version=read.integer(a, semconv.POLICY_VERSION),
        input_tokens=read.integer(a, semconv.USAGE_INPUT),
        output_tokens=read.integer(a, semconv.USAGE_OUTPUT),
        error=_error(span),
        malformed_tool_call=read.text(a, semconv.MALFORMED_TOOL_CALL),
    )


def _messages(attributes: Attributes, name: str) -> Sequence[Message]:
    """Chat messages of an attribute; none when it is absent or no JSON."""
    try:
        return messages_from_json(read.text(attributes, name) or "[]")
    except ValueError:
        return []


def _tool_call(span: Span) -> ToolCall:
    a = span.attributes
    error = _error(span)
    stated = read.text(a, semconv.TOOL_STATUS)
    status = ToolStatus.RAISED if error is not None else ToolStatus.OK
    if stated in {s.value for s in ToolStatus}:
        status = ToolStatus(stated)
    return ToolCall(
        span_id=span.span_id,
        parent_id=span.parent_id,
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        name=read.text(a, semconv.TOOL_NAME) or span.name,
        arguments=read.parsed(a, semconv.TOOL_ARGUMENTS),
        result=read.parsed(a, semconv.TOOL_RESULT),
        status=status,
        error=error,
        call_id=read.text(a, semconv.TOOL_CALL_ID),
        agent_name=read.text(a, semconv.AGENT_NAME),
    )


def _agent_run(span: Span) -> AgentRun:
    name = read.text(span.attributes, semconv.AGENT_NAME) or span.name
    return AgentRun(span.span_id, span.parent_id, span.start_ns, span.end_ns, name, _error(span))


def _reward(span: Span) -> list[Reward]:
    value = read.number(span.attributes, semconv.REWARD_VALUE)
    if value is None or not math.isfinite(value):
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


def _error(span: Span) -> str | None:
    if span.status is not SpanStatus.ERROR:
        return None
    return span.status_message or read.text(span.attributes, semconv.ERROR_TYPE) or "error"


def _tool_definitions(value: Json) -> list[JsonObject]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [tool for tool in value if isinstance(tool, Mapping)]


def text_of(message: Message | None) -> str:
    """The text of a chat message; parts that are not text are left out."""
    content = message.get("content") if message else None
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(t for t in texts if isinstance(t, str))
    return ""
