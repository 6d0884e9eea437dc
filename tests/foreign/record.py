"""Records what each application sends, as the samples of tests/core/foreign_traces.

    python -m tests.foreign.record [NAME[=SAMPLE] ...]

An application runs in a process of its own against a scripted model; its spans arrive over OTLP/HTTP.
APPLICATION_PYTHON names the interpreter of another environment, for packages that do not fit this one:

    genai_openai_v2                           opentelemetry-instrumentation-openai-v2 2.4b0, -util-genai 0.4b0
    traceloop_openai=traceloop_0_40_openai    opentelemetry-instrumentation-openai 0.40.14, wrapt < 2
    traceloop_langchain=traceloop_0_40_langchain    opentelemetry-instrumentation-langchain 0.40.14, wrapt < 2
    pydantic_ai_1_events                      pydantic-ai-slim 1.107
    pydantic_ai_and_openai=pydantic_ai_2_68_and_openai              pydantic-ai-slim 2.68, openai 3.57
    openinference_openai_agents=openinference_openai_agents_0_24    openai-agents 0.24, openai 3.57
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.adapters.scripted_server import ScriptedServer, call, say

from agentlightning.otlp import export_request
from agentlightning.reading.dialects.base import STACK
from agentlightning.types import Attributes, AttributeValue, Span, SpanEvent

SAMPLES = Path(__file__).parents[1] / "core" / "foreign_traces"
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
ELSEWHERE = ("genai_openai_v2", "pydantic_ai_1_events")
"""Applications whose packages need an environment of their own."""


def run_application(
    name: str, openai_url: str, otlp_url: str, python: str = sys.executable, **env: str
) -> None:
    """Run one application to its end; its output is shown when it fails."""
    settings = {
        "OPENAI_BASE_URL": openai_url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp_url,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "AGENTLIGHTNING_URL": otlp_url,
        "PYTHONPATH": str(ROOT),
        **env,
    }
    done = subprocess.run(
        [python, "-m", "tests.foreign.applications", name],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


_UNREAD = ("input.value", "output.value", "traceloop.entity.input", "traceloop.entity.output", "gen_ai.task.")
_SHOWN = 60  # characters of a text that no dialect reads


def without_unread(span: Span) -> Span:
    """A sample's span without the bulk of what nobody reads: a chain's whole state, stack traces."""
    kinds = (span.attributes.get("openinference.span.kind"), span.attributes.get("traceloop.span.kind"))
    is_step = any(kind in ("CHAIN", "task", "workflow") for kind in kinds)
    events = tuple(_without_stack(event) for event in span.events)
    attributes = _cut(span.attributes) if is_step else span.attributes
    message, stack, _ = span.status_message.partition(STACK)
    return replace(span, attributes=attributes, events=events, status_message=message + stack)


def _cut(attributes: Attributes) -> Attributes:
    return {name: _short(value) if name.startswith(_UNREAD) else value for name, value in attributes.items()}


def _short(value: AttributeValue) -> AttributeValue:
    return f"{value[:_SHOWN]}..." if isinstance(value, str) and len(value) > _SHOWN else value


def _without_stack(event: SpanEvent) -> SpanEvent:
    kept = {name: value for name, value in event.attributes.items() if name != "exception.stacktrace"}
    return replace(event, attributes=kept)


def record(name: str, python: str = sys.executable, **env: str) -> list[Span]:
    """The spans of one run, in the order of their starts."""
    with ScriptedServer() as server:
        server.given(call(("add", {"a": 1, "b": 2})), call(("add", {"a": "z"})), say("3"))
        run_application(name, server.openai_url, server.url, python, **env)
        unique = {span.span_id: span for span in server.spans}
        return sorted(unique.values(), key=lambda span: span.start_ns)


def main() -> None:
    from tests.foreign.applications import APPLICATIONS

    SAMPLES.mkdir(exist_ok=True)
    for argument in sys.argv[1:] or [name for name in APPLICATIONS if name not in ELSEWHERE]:
        name, _, saved_as = argument.partition("=")
        spans = record(name, os.environ.get("APPLICATION_PYTHON", sys.executable))
        path = SAMPLES / f"{saved_as or name}.json"
        request = export_request([without_unread(span) for span in spans])
        path.write_text(json.dumps(request, ensure_ascii=False, separators=(",", ":")) + "\n")
        print(f"{path}: {len(spans)} spans, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
