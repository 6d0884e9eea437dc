"""Spans captured in memory, for tests of agents and of adapters."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from agentlightning.tracing.light import LightTracer
from agentlightning.tracing.process import set_tracer
from agentlightning.types import Span


class ListSender:
    """Keeps finished spans in a list, in the order in which they ended."""

    dropped = 0

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def put(self, span: Span) -> None:
        self.spans.append(span)

    def flush(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    def shutdown(self, timeout_s: float) -> None: ...


@contextmanager
def capture_spans() -> Generator[list[Span]]:
    """Inside, the process's tracer writes into the list that is given; nothing is sent.

    Example:
        with capture_spans() as spans:
            agent.invoke(...)
        assert [span.name for span in spans] == ["chat m", "invoke_agent helper"]
    """
    sender = ListSender()
    before = set_tracer(LightTracer(sender))
    try:
        yield sender.spans
    finally:
        set_tracer(before)
