"""pydantic-ai's own spans, which logfire shows: the GenAI conventions of their time, and names of its own.

Versions 2 to 5 of its format write messages as attributes, version 1 as events. Before it knew of
`gen_ai.operation.name` for agents and tools, its names for them were `agent_name` and `tool_arguments`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from agentlightning import semconv
from agentlightning.reading import attributes as read
from agentlightning.reading.dialects import base, genai, genai_events
from agentlightning.reading.dialects.base import Dialect, Kind
from agentlightning.types import AgentRun, LLMCall, Span, SpanStatus, ToolCall, ToolStatus

SCOPE: Final = "pydantic-ai"
_FAILURE_STAGE: Final = "pydantic_ai.tool.failure_stage"


def kind(span: Span) -> Kind | None:
    """By the operation's name, else by the names from before."""
    if span.scope != SCOPE:
        return None
    if semconv.OPERATION in span.attributes:
        return genai.kind(span) or Kind.OTHER
    if semconv.TOOL_NAME in span.attributes:
        return Kind.TOOL
    return Kind.AGENT if "agent_name" in span.attributes else Kind.OTHER


def llm(span: Span) -> LLMCall:
    """A model call, of either age."""
    return (genai if semconv.INPUT_MESSAGES in span.attributes else genai_events).llm(span)


def tool(span: Span) -> ToolCall:
    """A tool call. Arguments that do not validate are named as such."""
    a = span.attributes
    call = genai.tool(span)
    if semconv.TOOL_ARGUMENTS not in a:
        call = replace(
            call, arguments=read.parsed(a, "tool_arguments"), result=read.parsed(a, "tool_response")
        )
    if span.status is SpanStatus.ERROR and read.text(a, _FAILURE_STAGE) == "validation":
        call = replace(call, status=ToolStatus.BAD_ARGUMENTS)
    return call


def agent(span: Span) -> AgentRun:
    """An agent's run."""
    return base.agent_run(span, read.text(span.attributes, semconv.AGENT_NAME, "agent_name"))


PYDANTIC_AI: Final = Dialect("pydantic-ai", kind, llm, tool, agent)
