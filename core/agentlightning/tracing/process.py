"""The process's tracer: chosen once by `configure` or the environment, replaced by a rollout's own.

Invariant: importing this starts no thread and imports no OpenTelemetry; without a server the tracer is
`NoTracer`. A forked child may `configure` again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal, get_args

from agentlightning import context, semconv
from agentlightning.context import SpanRef, current_rollout, use_open_span
from agentlightning.errors import InvalidInput
from agentlightning.tracing.base import NO_ATTRIBUTES, NO_SPAN, NoTracer, SpanHandle, Tracer
from agentlightning.tracing.guard import guarded, text_of_error, warn
from agentlightning.types import Attributes, SpanStatus

TracerName = Literal["otel", "light"]

_tracer: Tracer | None = None
_server_url: str = ""
_lock = threading.Lock()


def configure(url: str | None = None, key: str | None = None, tracer: TracerName | None = None) -> Tracer:
    """Send this process's spans to the server at `url`; returns the tracer that does.

    What is left out comes from AGENTLIGHTNING_URL, AGENTLIGHTNING_KEY and AGENTLIGHTNING_TRACER ("otel", the
    default, or "light"). Without a URL nothing is recorded. An earlier tracer is flushed and stopped.
    Raises InvalidInput for a URL or tracer name that cannot be used.
    """
    global _server_url
    chosen_url = os.environ.get(context.ENV_URL, "") if url is None else url
    built = _build(
        chosen_url,
        os.environ.get(context.ENV_KEY, "") if key is None else key,
        tracer or os.environ.get(context.ENV_TRACER) or "otel",
    )
    _server_url = chosen_url
    before = set_tracer(built)
    if before is not None:
        before.shutdown()
    return built


def build_tracer(url: str, key: str = "", tracer: TracerName = "otel") -> Tracer:
    """A tracer of its own for one rollout; the process's stays as it is."""
    return _build(url, key, tracer)


def _build(url: str, key: str, tracer: str) -> Tracer:
    if not url:
        return NoTracer()
    if tracer not in get_args(TracerName):
        raise InvalidInput(f'The tracer must be "otel" or "light", not {tracer!r}.')
    if tracer == "otel" and os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        warn("OTEL_SDK_DISABLED is set: spans are sent to %s without OpenTelemetry.", url)
        tracer = "light"
    from agentlightning.tracing.sender import HttpSender

    sender = HttpSender(url, key)
    if tracer == "otel":
        from agentlightning.tracing.otel import OTelTracer

        return OTelTracer(sender)
    from agentlightning.tracing.light import LightTracer

    return LightTracer(sender)


def get_tracer() -> Tracer:
    """The rollout's tracer where it has one, else the process's."""
    active = current_rollout()
    if active is not None and active.tracer is not None:
        return active.tracer
    return _tracer or _from_environment()


def _from_environment() -> Tracer:
    with _lock:
        if _tracer is not None:
            return _tracer
        try:
            return configure()
        except InvalidInput as error:
            warn("Nothing is recorded: %s Correct the environment.", error)
            return configure(url="")


def set_tracer(tracer: Tracer | None) -> Tracer | None:
    """Make this the process's tracer and give back the one before; None reads the environment again."""
    global _tracer
    before, _tracer = _tracer, tracer
    return before


def server_url() -> str:
    """The URL of the server that this process was configured for, or empty."""
    return _server_url or os.environ.get(context.ENV_URL, "")


@contextmanager
def trace(name: str, attributes: Attributes = NO_ATTRIBUTES) -> Generator[SpanRef]:
    """Everything inside is one trace, so one live rollout where no rollout is given.

    Needed only where one task makes several agent runs or bare model calls, or where a reward is emitted
    after them. Its `rollout_id` is for rewards that come later.
    """
    span = _started(name, attributes)
    if span is None:
        yield NO_SPAN.ref
        return
    try:
        with use_open_span(span.ref):
            yield span.ref
    except BaseException as error:
        end_with_error(span, error)
        raise
    end_well(span)


@guarded
def _started(name: str, attributes: Attributes) -> SpanHandle | None:
    return get_tracer().start_span(name, parent=context.open_span(), attributes=attributes)


@guarded
def end_with_error(span: SpanHandle, error: BaseException) -> None:
    """End a span whose work was ended by this exception, a cancellation included. Never raises."""
    span.set({semconv.ERROR_TYPE: type(error).__qualname__})
    span.end(SpanStatus.ERROR, text_of_error(error))


@guarded
def end_well(span: SpanHandle) -> None:
    """End a span whose work went well. Never raises."""
    span.end()
