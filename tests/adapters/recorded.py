"""What an adapter recorded, for tests to ask about."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from tests.adapters.scripted_server import ScriptedServer

from agentlightning import semconv
from agentlightning.messages import messages_from_json
from agentlightning.tracing import configure, get_tracer
from agentlightning.types import Span


@contextmanager
def recording(tracer: Any = "light") -> Generator[ScriptedServer]:
    """A scripted server that this process sends its spans to."""
    with ScriptedServer() as server:
        configure(server.url, tracer=tracer)
        try:
            yield server
        finally:
            configure("")


class Recorded:
    """The spans that have arrived at the server, in the order of their starts."""

    def __init__(self, server: ScriptedServer) -> None:
        assert get_tracer().flush(10)
        assert get_tracer().dropped == 0
        self.server = server
        self.spans = sorted(server.spans, key=lambda span: (span.start_ns, span.parent_id is not None))
        self.by_id = {span.span_id: span for span in self.spans}
        assert len(self.by_id) == len(self.spans)

    def of(self, operation: str) -> list[Span]:
        return [span for span in self.spans if span.attributes.get(semconv.OPERATION) == operation]

    @property
    def llm(self) -> list[Span]:
        return self.of(semconv.OP_CHAT)

    @property
    def tools(self) -> list[Span]:
        return self.of(semconv.OP_TOOL)

    @property
    def agents(self) -> list[Span]:
        return self.of(semconv.OP_AGENT)

    def parent(self, span: Span) -> str | None:
        """The parent's name; None for a root. A parent that was not recorded is an error."""
        return None if span.parent_id is None else self.by_id[span.parent_id].name

    def tree(self) -> list[tuple[str, str | None]]:
        """Name and parent's name of every span."""
        return [(span.name, self.parent(span)) for span in self.spans]

    def one(self, name: str) -> Span:
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def tool_statuses(self) -> dict[str, Any]:
        """Status by the part of the call id that the script gave it: call_<name>_<index>."""
        return {
            "_".join(str(span.attributes[semconv.TOOL_CALL_ID]).split("_")[1:3]): span.attributes[
                semconv.TOOL_STATUS
            ]
            for span in self.tools
            if semconv.TOOL_CALL_ID in span.attributes
        }

    def assert_joined(self, answered: int | None = None) -> None:
        """Each answered request has its own LLM span, which it named as its parent."""
        requests = [request for request in self.server.requests if request.reply.status == 200]
        named = [request.headers["traceparent"].split("-") for request in requests]
        spans = {(span.trace_id, span.span_id): span for span in self.llm if not failed(span)}
        assert len(named) == len(spans) == (len(requests) if answered is None else answered)
        assert {(trace_id, span_id) for _, trace_id, span_id, _ in named} == set(spans)
        for request, (_, trace_id, span_id, _) in zip(requests, named, strict=True):
            span = spans[trace_id, span_id]
            assert span.rollout_id == request.headers.get(semconv.HEADER_ROLLOUT)
            assert span.attempt_id == request.headers.get(semconv.HEADER_ATTEMPT)
            assert sent(span) == comparable(request.body["messages"])


def failed(span: Span) -> bool:
    return semconv.ERROR_TYPE in span.attributes


def sent(span: Span) -> list[Any]:
    """The messages that the span says were sent."""
    return comparable(messages_from_json(str(span.attributes[semconv.INPUT_MESSAGES])))


def answered(span: Span) -> Any:
    """The message that the span says was answered."""
    (message,) = messages_from_json(str(span.attributes[semconv.OUTPUT_MESSAGES]))
    return message


def comparable(messages: list[Any]) -> list[Any]:
    """Messages without fields that are null, which say the same as absent ones."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]
