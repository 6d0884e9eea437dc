from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.core.span_receiver import SpanReceiver, without_ids_and_times

from agentlightning import semconv
from agentlightning.context import ENV_KEY, ENV_TRACER, ENV_URL, ActiveRollout, SpanRef, use_rollout
from agentlightning.errors import InvalidInput
from agentlightning.tracing import NoTracer, Tracer, build_tracer, configure, get_tracer, set_tracer, trace
from agentlightning.tracing.light import LightTracer
from agentlightning.tracing.sender import HttpSender
from agentlightning.types import SpanKind, SpanStatus, live_rollout_id

both = pytest.mark.parametrize("name", ["otel", "light"])


@contextmanager
def started(name: Any, receiver: SpanReceiver, key: str = "") -> Generator[Tracer]:
    tracer = build_tracer(receiver.url, key, name)
    try:
        yield tracer
    finally:
        tracer.shutdown()


def write_everything(tracer: Tracer) -> None:
    """One agent run with all that a span can hold."""
    with use_rollout(ActiveRollout("r1", "r1-1")):
        root = tracer.start_span("invoke_agent a", attributes={"n": 3, "none": None}, start_ns=1_000)
        call = tracer.start_span(
            "chat m",
            kind=SpanKind.CLIENT,
            parent=root.ref,
            scope="agentlightning.test",
            attributes={
                "text": "é",
                "lone surrogate": "a\ud800b",
                "flag": True,
                "x": 0.5,
                "bytes": b"\x00\xff",
                "texts": ["a", "b"],
                "mixed": ["a", 1],
                "mapping": {"a": [1, None]},
                "big": 2**70,
            },
            start_ns=2_000,
        )
        call.event("first token", {"index": 0}, 2_500)
        call.set({"late": 1})
        call.end(SpanStatus.ERROR, "server said no", 3_000)
        call.set({"too late": 1})
        call.end()
        root.end(SpanStatus.OK, "not an error", 4_000)


def test_both_tracers_write_identical_spans() -> None:
    with SpanReceiver() as light, SpanReceiver() as otel:
        for name, receiver in (("light", light), ("otel", otel)):
            with started(name, receiver) as tracer:
                write_everything(tracer)
                assert tracer.flush()
                assert tracer.dropped == 0
        assert without_ids_and_times(light.spans) == without_ids_and_times(otel.spans)
        call, root = without_ids_and_times(light.spans)
        assert (root.name, root.parent_id, root.attributes) == ("invoke_agent a", None, {"n": 3})
        assert (call.name, call.parent_id, call.kind) == ("chat m", "invoke_agent a", SpanKind.CLIENT)
        assert (call.rollout_id, call.attempt_id, call.scope) == ("r1", "r1-1", "agentlightning.test")
        assert call.status_message == "server said no"
        assert call.attributes["lone surrogate"] == "a\ufffdb"
        assert call.attributes["bytes"] == b"\x00\xff"
        assert call.attributes["mapping"] == '{"a":[1,null]}'
        assert (root.status, root.status_message) == (SpanStatus.OK, "")
        for receiver in (light, otel):
            times = [(span.start_ns, span.end_ns) for span in receiver.spans]
            assert times == [(2_000, 3_000), (1_000, 4_000)]
            assert [event.time_ns for event in receiver.spans[0].events] == [2_500]


@both
def test_spans_go_to_the_traces_endpoint_with_the_key(name: str) -> None:
    with SpanReceiver() as receiver, started(name, receiver, key="k1") as tracer:
        tracer.start_span("x").end()
        assert tracer.flush()
        headers = receiver.headers[0]
    assert headers[":path"] == "/v1/traces"
    assert headers["authorization"] == "Bearer k1"


@both
@pytest.mark.parametrize(("host", "encoding"), [("127.0.0.1", None), ("0.0.0.0", "gzip")])
def test_spans_are_compressed_for_another_machine_only(name: str, host: str, encoding: str | None) -> None:
    with SpanReceiver() as receiver:
        receiver.url = receiver.url.replace("127.0.0.1", host)
        with started(name, receiver) as tracer:
            tracer.start_span("x", attributes={"text": "t" * 10_000}).end()
            assert tracer.flush()
    assert receiver.headers[0].get("content-encoding") == encoding
    assert [span.attributes["text"] for span in receiver.spans] == ["t" * 10_000]


@both
def test_a_busy_server_is_asked_again_and_nothing_is_lost(name: str) -> None:
    with SpanReceiver() as receiver, started(name, receiver) as tracer:
        receiver.answers.extend([(503, b"busy")])
        tracer.start_span("x").end()
        assert tracer.flush(10)
        assert [span.name for span in receiver.spans] == ["x"]
        assert tracer.dropped == 0


@both
def test_a_refusal_is_counted_and_logged_not_raised(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with SpanReceiver() as receiver, caplog.at_level(logging.WARNING), started(name, receiver) as tracer:
        receiver.answers.extend([(401, b"who are you?")] * 3)
        tracer.start_span("x").end()
        tracer.flush()
        assert tracer.dropped == 1
    assert "401" in caplog.text


@both
def test_flush_gives_up_after_its_time(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with SpanReceiver() as receiver, started(name, receiver) as tracer:
        receiver.hold.clear()
        tracer.start_span("x").end()
        begin = time.monotonic()
        assert not tracer.flush(0.2)
        assert time.monotonic() - begin < 2
        assert "[non-fatal]" in caplog.text
        receiver.hold.set()
        assert tracer.flush(10)


def test_a_full_queue_drops_with_a_counter_and_never_waits() -> None:
    with SpanReceiver() as receiver:
        receiver.hold.clear()
        sender = HttpSender(receiver.url, max_queue=10)
        tracer = LightTracer(sender)
        begin = time.monotonic()
        for _ in range(1000):
            tracer.start_span("x").end()
        assert time.monotonic() - begin < 1
        assert tracer.dropped >= 1000 - 10 - 512
        receiver.hold.set()
        assert tracer.flush(10)
        assert len(receiver.spans) + tracer.dropped == 1000
        tracer.shutdown()


def test_spans_that_the_server_rejects_one_by_one_are_counted() -> None:
    with SpanReceiver() as receiver, started("light", receiver) as tracer:
        answer = {"partialSuccess": {"rejectedSpans": "1", "errorMessage": "no rewards with this key"}}
        receiver.answers.append((200, json.dumps(answer).encode()))
        tracer.start_span("x").end()
        assert tracer.flush()
        assert tracer.dropped == 1


def test_a_batch_that_is_too_large_is_halved() -> None:
    with SpanReceiver() as receiver, started("light", receiver) as tracer:
        receiver.answers.append((413, b""))
        for i in range(8):
            tracer.start_span(str(i)).end()
        assert tracer.flush()
        assert sorted(span.name for span in receiver.spans) == [str(i) for i in range(8)]
        assert len(receiver.headers) == 3


@both
def test_long_conversations_are_sent_in_requests_that_the_server_takes(name: str) -> None:
    with SpanReceiver() as receiver, started(name, receiver) as tracer:
        receiver.max_bytes = 10 * 2**20
        for i in range(30):
            tracer.start_span(str(i), attributes={"history": "x" * 2**20}).end()
        assert tracer.flush(30)
        assert len(receiver.spans) == 30
        assert tracer.dropped == 0


def test_an_unreachable_server_costs_the_batch_after_a_while_only() -> None:
    with SpanReceiver() as receiver:
        gone = receiver.url
    tracer = LightTracer(HttpSender(gone, retry_for_s=0.1))
    tracer.start_span("x").end()
    assert tracer.flush(10)
    assert tracer.dropped == 1
    tracer.shutdown()


def test_without_a_server_nothing_is_recorded_and_no_thread_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_URL, raising=False)
    threads = threading.active_count()
    before = set_tracer(None)
    try:
        tracer = get_tracer()
        assert isinstance(tracer, NoTracer)
        with trace("task") as ref:
            assert ref.closed
        assert threading.active_count() == threads
    finally:
        set_tracer(before)


def test_the_environment_configures_the_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    with SpanReceiver() as receiver:
        monkeypatch.setenv(ENV_URL, receiver.url)
        monkeypatch.setenv(ENV_KEY, "k2")
        monkeypatch.setenv(ENV_TRACER, "light")
        before = set_tracer(None)
        try:
            with trace("task"):
                pass
            assert get_tracer().flush()
            assert receiver.headers[0]["authorization"] == "Bearer k2"
            get_tracer().shutdown()
        finally:
            set_tracer(before)


def test_a_broken_environment_is_a_warning_and_not_the_agents_problem(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENV_URL, "not a url")
    before = set_tracer(None)
    try:
        assert isinstance(get_tracer(), NoTracer)
        assert "not a url" in caplog.text
    finally:
        set_tracer(before)


@pytest.mark.parametrize(("url", "name"), [("ftp://x", "light"), ("ftp://x", "otel"), ("http://x", "jaeger")])
def test_what_cannot_be_configured_is_refused(url: str, name: Any) -> None:
    before = set_tracer(None)
    try:
        with pytest.raises(InvalidInput):
            configure(url, tracer=name)
    finally:
        set_tracer(before)


@both
def test_a_span_names_its_rollout_or_the_live_one_of_its_trace(name: str) -> None:
    with SpanReceiver() as receiver, started(name, receiver) as tracer:
        live = tracer.start_span("x").ref
        assert live.rollout_id == live_rollout_id(live.trace_id)
        with use_rollout(ActiveRollout("r", "r-1")):
            assert tracer.start_span("y").ref.rollout_id == "r"


def test_a_rollouts_own_tracer_wins_over_the_process() -> None:
    own = NoTracer()
    with use_rollout(ActiveRollout("r", "r-1", tracer=own)):
        assert get_tracer() is own
    assert get_tracer() is not own


@both
def test_concurrent_threads_lose_no_span(name: str) -> None:
    with SpanReceiver() as receiver, started(name, receiver) as tracer:

        def write() -> None:
            for _ in range(200):
                tracer.start_span("x").end()

        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tracer.flush(20)
        assert len({span.span_id for span in receiver.spans}) == 1600


def run_python(code: str, **env: str) -> str:
    """Standard output of a fresh interpreter that runs the code."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@both
def test_spans_are_sent_at_exit(name: str) -> None:
    with SpanReceiver() as receiver:
        run_python(
            """
            from agentlightning.tracing import get_tracer
            get_tracer().start_span("last words").end()
            """,
            **{ENV_URL: receiver.url, ENV_TRACER: name},
        )
        assert [span.name for span in receiver.spans] == ["last words"]


@both
def test_a_server_that_is_away_delays_the_exit_by_five_seconds_at_most(name: str) -> None:
    with SpanReceiver() as receiver:
        receiver.hold.clear()
        begin = time.monotonic()
        run_python(
            """
            from agentlightning.tracing import get_tracer
            get_tracer().start_span("last words").end()
            """,
            **{ENV_URL: receiver.url, ENV_TRACER: name},
        )
        assert time.monotonic() - begin < 12


@both
def test_a_forked_child_sends_its_own_spans_and_not_the_parents(name: str) -> None:
    with SpanReceiver() as receiver:
        run_python(
            """
            import os
            from agentlightning.tracing import get_tracer
            tracer = get_tracer()
            tracer.start_span("parent before").end()
            child = os.fork()
            if child == 0:
                tracer.start_span("child").end()
                tracer.flush()
                os._exit(0)
            os.waitpid(child, 0)
            tracer.start_span("parent after").end()
            """,
            **{ENV_URL: receiver.url, ENV_TRACER: name},
        )
        assert sorted(span.name for span in receiver.spans) == ["child", "parent after", "parent before"]


@both
def test_a_child_forked_from_a_preloaded_process_configures_its_own_tracer(name: str) -> None:
    with SpanReceiver() as receiver:
        run_python(
            f"""
            import os
            import agentlightning, agentlightning.tracing, agentlightning.openai_sdk, agentlightning.rewards
            import threading
            assert threading.active_count() == 1
            if (child := os.fork()) == 0:
                tracer = agentlightning.tracing.configure({receiver.url!r}, tracer={name!r})
                tracer.start_span("child").end()
                tracer.shutdown()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            """
        )
        assert [span.name for span in receiver.spans] == ["child"]


def test_the_light_tracer_needs_no_opentelemetry() -> None:
    with SpanReceiver() as receiver:
        out = run_python(
            """
            import sys
            import agentlightning.tracing as t, agentlightning.openai_sdk, agentlightning.rewards
            with t.trace("task"):
                agentlightning.rewards.emit_reward(1.0)
            t.get_tracer().flush()
            print([m for m in sys.modules if m.startswith(("opentelemetry", "google.protobuf", "requests"))])
            """,
            **{ENV_URL: receiver.url, ENV_TRACER: "light"},
        )
        assert out.strip() == "[]"
        assert len(receiver.spans) == 2


def in_an_application(body: str, receiver: SpanReceiver) -> Any:
    """What `body` prints as JSON, run where the application has its own OpenTelemetry SDK (`exported`)."""
    setup = """
        import json
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider, sampling
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from agentlightning.tracing import get_tracer
        exported = InMemorySpanExporter()
        def install(**settings):
            provider = TracerProvider(**settings)
            provider.add_span_processor(SimpleSpanProcessor(exported))
            trace.set_tracer_provider(provider)
    """
    code = textwrap.dedent(setup) + textwrap.dedent(body)
    return json.loads(run_python(code, **{ENV_URL: receiver.url, ENV_TRACER: "otel"}))


def test_the_applications_collectors_get_our_spans_and_our_server_gets_only_ours() -> None:
    with SpanReceiver() as receiver:
        names, link, outer, parent = in_an_application(
            """
            install()
            with trace.get_tracer("app").start_as_current_span("request") as outer:
                span = get_tracer().start_span("invoke_agent a")
                get_tracer().start_span("chat m", parent=span.ref).end()
                span.end()
            get_tracer().flush()
            chat, agent, request = exported.get_finished_spans()
            print(json.dumps([
                [chat.name, agent.name, request.name],
                agent.links[0].context.span_id, request.context.span_id, agent.parent,
            ]))
            """,
            receiver,
        )
        assert names == ["chat m", "invoke_agent a", "request"]
        assert link == outer
        assert parent is None
        assert sorted(span.name for span in receiver.spans) == ["chat m", "invoke_agent a"]


def test_an_application_that_sets_its_provider_late_still_gets_our_spans() -> None:
    with SpanReceiver() as receiver:
        seen = in_an_application(
            """
            get_tracer().start_span("early").end()
            install()
            get_tracer().start_span("late").end()
            get_tracer().flush()
            print(json.dumps([span.name for span in exported.get_finished_spans()]))
            """,
            receiver,
        )
        assert seen == ["late"]
        assert sorted(span.name for span in receiver.spans) == ["early", "late"]


def test_an_application_that_samples_costs_no_training_data() -> None:
    with SpanReceiver() as receiver:
        in_an_application(
            """
            install(sampler=sampling.TraceIdRatioBased(0.0))
            get_tracer().start_span("kept").end()
            get_tracer().flush()
            print("null")
            """,
            receiver,
        )
        assert [span.name for span in receiver.spans] == ["kept"]


@pytest.mark.parametrize("limit", ["max_span_attribute_length=10", "max_span_attributes=1"])
def test_an_application_that_cuts_its_spans_costs_no_training_data(limit: str) -> None:
    with SpanReceiver() as receiver:
        in_an_application(
            f"""
            from opentelemetry.sdk.trace import SpanLimits
            install(span_limits=SpanLimits({limit}))
            get_tracer().start_span("whole", attributes={{"text": "x" * 100, "more": 1}}).end()
            get_tracer().flush()
            print("null")
            """,
            receiver,
        )
        assert receiver.spans[0].attributes == {"text": "x" * 100, "more": 1}


@pytest.mark.parametrize(
    "setting",
    [
        ("OTEL_TRACES_SAMPLER", "always_off"),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "10"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "1"),
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20theirs,x-collector-key=secret"),
    ],
    ids=lambda setting: setting[0],
)
def test_settings_of_the_applications_own_telemetry_do_not_apply_to_ours(
    setting: tuple[str, str],
) -> None:
    with SpanReceiver() as receiver:
        run_python(
            """
            from agentlightning.tracing import get_tracer
            get_tracer().start_span("whole", attributes={"text": "x" * 100, "more": 1}).end()
            """,
            **{ENV_URL: receiver.url, ENV_KEY: "ours", ENV_TRACER: "otel", setting[0]: setting[1]},
        )
        assert receiver.spans[0].attributes == {"text": "x" * 100, "more": 1}
        assert receiver.headers[0]["authorization"] == "Bearer ours"
        assert "x-collector-key" not in receiver.headers[0]


def test_an_unfinished_trace_ends_with_the_error() -> None:
    from agentlightning.tracing import capture_spans

    def fails() -> None:
        with trace("task"):
            raise RuntimeError("no luck")

    with capture_spans() as spans, pytest.raises(RuntimeError):
        fails()
    assert (spans[0].status, spans[0].status_message) == (SpanStatus.ERROR, "no luck")
    assert spans[0].attributes[semconv.ERROR_TYPE] == "RuntimeError"


def test_ids_do_not_follow_the_agents_random_seed() -> None:
    import random

    from agentlightning.tracing import capture_spans

    refs: list[SpanRef] = []
    with capture_spans():
        for _ in range(2):
            random.seed(0)
            refs.append(get_tracer().start_span("x").ref)
    assert refs[0].trace_id != refs[1].trace_id


def test_guarded_hooks_log_once_and_count() -> None:
    from agentlightning.tracing.guard import failures, guarded

    def broken() -> int:
        raise ValueError("bug")

    safe: Callable[[], int | None] = guarded(broken)
    place = f"{broken.__module__}.{broken.__qualname__}"
    assert [safe(), safe()] == [None, None]
    assert failures[place] == 2


@both
def test_texts_that_utf8_cannot_hold_cost_no_span(name: str) -> None:
    with SpanReceiver() as receiver, started(name, receiver) as tracer:
        first = tracer.start_span("a \udcff", attributes={"key \udcff": "v"})
        first.event("event \udcff")
        first.end(SpanStatus.ERROR, "file \udcff.txt")
        tracer.start_span("neighbour").end()
        assert tracer.flush(10)
        assert tracer.dropped == 0
        assert sorted(span.name for span in receiver.spans) == ["a \ufffd", "neighbour"]
        (bad,) = [span for span in receiver.spans if span.name != "neighbour"]
    assert (bad.status_message, bad.attributes["key \ufffd"]) == ("file \ufffd.txt", "v")


def test_a_span_that_the_server_refuses_does_not_cost_the_others() -> None:
    with SpanReceiver() as receiver, started("light", receiver) as tracer:
        receiver.answers.extend([(400, b"no"), (400, b"no")])  # the whole, and its first half
        for text in ("a", "b"):
            tracer.start_span(text).end()
        tracer.flush(10)
        assert [span.name for span in receiver.spans] == ["b"]
        assert tracer.dropped == 1


@both
def test_a_redirect_gets_no_key_and_is_a_loss_that_is_told(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with SpanReceiver() as receiver:

        class Elsewhere(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(302)
                self.send_header("location", f"{receiver.url}/v1/traces")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]

        with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server, caplog.at_level(logging.WARNING):
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            tracer = build_tracer(f"http://127.0.0.1:{server.server_address[1]}", "secret", name)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            tracer.start_span("x").end()
            tracer.flush(10)
            assert tracer.dropped == 1
            tracer.shutdown()
            server.shutdown()
        assert not receiver.headers
    assert "redirects to" in caplog.text


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@both
def test_an_exception_that_cannot_be_asked_is_recorded_and_comes_out_as_it_was(name: Any) -> None:
    odd: Any = {"when": datetime.now(UTC), "thing": object()}
    with SpanReceiver() as receiver:
        configure(receiver.url, tracer=name)
        try:
            with pytest.raises(Mute), trace("task", odd):
                raise Mute
            assert get_tracer().flush(10)
        finally:
            configure("")
    (span,) = receiver.spans
    assert (span.status, span.status_message) == (SpanStatus.ERROR, "Mute")
    assert str(span.attributes["when"]).startswith('"20')
