"""One table of how other people's instrumentations write model calls, tool calls and agent runs.

    GENAI          OpenTelemetry's GenAI conventions as they are now, and every span of ours
    GENAI_EVENTS   the same up to version 1.36: messages as events, or as the attribute `events`
    PYDANTIC_AI    pydantic-ai and logfire: the conventions of either age, with names of its own for tools
    OPENINFERENCE  Arize's `openinference.span.kind`, `llm.input_messages.0.message.role`, ...
    TRACELOOP      OpenLLMetry's `traceloop.*`, and its `gen_ai.prompt.0.role`, ... of before 2026

A dialect says what a span is and builds the record of it; the first one that knows a span reads it. To read
another dialect, add a module with its `Dialect` and put it into the table, before what it could be taken for.
What this is not: the join with the gateway (`join`), or the rule for two instrumentations that saw one call
(`duplicates`). Invariant: whatever the attributes hold, reading them never raises.
"""

from __future__ import annotations

from typing import Final

from agentlightning.reading.dialects.base import Dialect, Kind
from agentlightning.reading.dialects.genai import GENAI
from agentlightning.reading.dialects.genai_events import GENAI_EVENTS
from agentlightning.reading.dialects.openinference import OPENINFERENCE
from agentlightning.reading.dialects.pydantic_ai import PYDANTIC_AI
from agentlightning.reading.dialects.traceloop import TRACELOOP
from agentlightning.types import Span

DIALECTS: Final = (PYDANTIC_AI, OPENINFERENCE, TRACELOOP, GENAI_EVENTS, GENAI)
OWN_SCOPES: Final = "agentlightning"


def is_own(span: Span) -> bool:
    """Whether one of our adapters, or the gateway, wrote the span."""
    return span.scope.startswith(OWN_SCOPES)


def recognise(span: Span) -> tuple[Dialect, Kind] | None:
    """The dialect that reads a span and what the span is; None for one of no interest."""
    for dialect in (GENAI,) if is_own(span) else DIALECTS:
        kind = dialect.kind(span)
        if kind is not None:
            return None if kind is Kind.OTHER else (dialect, kind)
    return None


__all__ = ["DIALECTS", "Dialect", "Kind", "is_own", "recognise"]
