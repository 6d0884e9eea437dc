from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.spans import adapter_call, agent_run, attempt, gateway_call, reward, rollout, tool, user

from agentlightning import semconv
from agentlightning.doctor import Recorded
from agentlightning.errors import InvalidSpans
from agentlightning.export import (
    ExportSettings,
    Report,
    recorded_from_spans,
    row_to_json,
    spans_from_file,
    transition_rows,
)
from agentlightning.learning import AIR, discounted, select_agents
from agentlightning.otlp import export_request
from agentlightning.types import RolloutStatus, Span

SAMPLES = Path(__file__).parent / "foreign_traces"


def rows_of(spans: list[Span], **settings: Any) -> tuple[list[dict[str, Any]], Report]:
    report = Report()
    recorded = Recorded(rollout(), [attempt()], spans)
    rows = list(transition_rows([recorded], ExportSettings(**settings), report))
    return [json.loads(row_to_json(row)) for row in rows], report


def two_exact_and_one_foreign() -> list[Span]:
    run = agent_run(0, "writer", end_ns=900)
    first = gateway_call(10, [1, 2], [3], messages=[user("q")], parent_id=run.span_id)
    checked = adapter_call(30, agent="checker", messages=[user("good?")])
    second = gateway_call(50, [1, 2, 3, 4], [5, 6], messages=[user("again")], parent_id=run.span_id)
    return [run, first, checked, second, reward(99, 1.0)]


def test_a_transition_has_the_tokens_that_were_sampled_and_what_they_earned() -> None:
    (first, second), report = rows_of(two_exact_and_one_foreign(), credit=discounted(0.5))
    assert first["prompt_ids"] == [1, 2]
    assert (first["response_ids"], first["logprobs"]) == ([3], [-0.5])
    assert (first["policy"], first["policy_version"], first["agent_name"]) == ("policy", 3, "writer")
    assert first["messages"] == [{"role": "user", "content": "q"}]
    assert first["output"] == {"role": "assistant", "content": "ok"}
    assert (first["rollout_id"], first["attempt_id"], first["task_id"]) == ("r1", "r1-1", "t1")
    assert [row["step"] for row in (first, second)] == [0, 2]
    assert [row["return"] for row in (first, second)] == [0.5, 1.0]
    assert [row["final_reward"] for row in (first, second)] == [1.0, 1.0]
    assert all(row["exact"] for row in (first, second))
    assert (report.exact, report.inexact, report.left_out) == (2, 0, 1)


def test_calls_without_ids_are_marked_and_in_their_place() -> None:
    rows, report = rows_of(two_exact_and_one_foreign(), all_calls=True)
    assert [(row["agent_name"], row["exact"]) for row in rows] == [
        ("writer", True),
        ("checker", False),
        ("writer", True),
    ]
    assert [rows[1][key] for key in ("prompt_ids", "response_ids", "logprobs", "policy_version")] == [
        None
    ] * 4
    assert (report.exact, report.inexact, report.left_out) == (2, 1, 0)


def test_logprobs_come_back_as_the_same_float32() -> None:
    values = np.random.default_rng(0).normal(size=200).astype("<f4")
    call = gateway_call(1, [1], [2] * 200, extra={semconv.RESPONSE_LOGPROBS: values.tobytes()})
    ((row,), _) = rows_of([call])
    assert np.array(row["logprobs"], np.float32).tolist() == values.tolist()
    assert max(len(str(value)) for value in row["logprobs"]) <= 16


def test_intermediate_rewards_of_air_and_of_targets_are_in_the_rows() -> None:
    asked = adapter_call(1, messages=[user("q")], output=_calling("c1"))
    executed = tool(20, call_id="c1")
    spans = [asked, executed, reward(30, 0.25, target=asked.span_id)]
    ((row,), _) = rows_of(spans, all_calls=True, air=AIR())
    assert row["reward"] == 0.35
    ((row,), _) = rows_of(spans, all_calls=True)
    assert row["reward"] == 0.25
    assert (row["final_reward"], row["return"]) == (None, None)


def _calling(call_id: str) -> dict[str, Any]:
    function = {"name": "calculator", "arguments": "{}"}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "function": function}]}


def test_agents_are_selected_by_glob() -> None:
    rows, report = rows_of(two_exact_and_one_foreign(), all_calls=True, select=select_agents("check*"))
    assert [row["agent_name"] for row in rows] == ["checker"]
    assert report.unselected == 2


def test_several_choices_of_one_call_are_several_rows() -> None:
    asked = adapter_call(1, response_id="x")
    choices = [
        gateway_call(2, [1], [i], parent_id=asked.span_id, extra={semconv.RESPONSE_ID: "x"}) for i in (5, 6)
    ]
    for all_calls in (False, True):
        rows, _ = rows_of([asked, *choices], all_calls=all_calls)
        assert sorted(row["response_ids"] for row in rows) == [[5], [6]]


def test_what_cannot_be_read_is_counted_with_its_reason() -> None:
    report = Report()
    broken = Recorded(rollout(), [attempt()], [reward(1, 1.0, "a"), reward(2, 1.0, "b")])
    failed = Recorded(rollout(status=RolloutStatus.FAILED), [attempt()], [])
    assert not list(transition_rows([broken, failed], ExportSettings(), report))
    assert report.problems["rollout failed"] == 1
    assert any("several reward dimensions" in sentence for sentence in report.problems)


# --- OTLP files ----------------------------------------------------------------------------------


def sample_text() -> str:
    return (SAMPLES / "genai_langchain.json").read_text()


def test_one_request_one_a_line_and_gzip_are_the_same_spans(tmp_path: Path) -> None:
    spans = spans_from_file(SAMPLES / "genai_langchain.json")
    assert len(spans) == 6
    lines = "".join(json.dumps(export_request([span])) + "\n" for span in spans) + "\n"
    pretty = json.dumps(json.loads(sample_text()), indent=2)
    for name, text in (("lines.jsonl", lines), ("pretty.json", pretty)):
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert {span.span_id: span for span in spans_from_file(path)} == {s.span_id: s for s in spans}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"resourceSpans": []}\n{"resourceSp', "line 2 is not JSON.*still written"),
        (b'{"resourceSpans": []}\n{"a"\n{"resourceSpans": []}\n', "line 2 is not JSON"),
        (b'{"resourceSpans": []}\n{"resourceLogs": []}\n', 'line 2: .*no "resourceSpans"'),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "x"}]}]}]}', "traceId must be 32 hex"),
        (b"\x0a\x12\xff", "not UTF-8 text .byte 2."),
        (b"\x0a\x12", "protobuf is not read"),
        (gzip.compress(b'{"resourceSpans": []}')[:-4], "not a whole gzip file"),
        (b"\x1f\x8bjunk", "not a whole gzip file"),
        (b"[" * 100_000, "not OTLP/JSON"),
        (b"[1, 2]", "must be a JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, body: bytes, said: str) -> None:
    path = tmp_path / "traces.json"
    path.write_bytes(body)
    with pytest.raises(InvalidSpans, match=said) as caught:
        spans_from_file(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpans, match=r"nowhere.*No such file"):
        spans_from_file(tmp_path / "nowhere")


def test_exact_ids_survive_a_file(tmp_path: Path) -> None:
    spans = two_exact_and_one_foreign()
    path = tmp_path / "traces.json"
    path.write_text(json.dumps(export_request(spans)))
    (record,) = recorded_from_spans(spans_from_file(path))
    rows = list(transition_rows([record], ExportSettings(), Report()))
    assert [(row["prompt_ids"], row["response_ids"]) for row in rows] == [
        ([1, 2], [3]),
        ([1, 2, 3, 4], [5, 6]),
    ]
    assert [(row["rollout_id"], row["final_reward"]) for row in rows] == [("r1", 1.0)] * 2


def without_ids(spans: list[Span]) -> list[Span]:
    return [replace(span, rollout_id=None, attempt_id=None) for span in spans]


def test_each_trace_of_a_file_is_a_rollout_unless_one_is_named() -> None:
    first, second = (replace(adapter_call(i), trace_id=f"{i + 1:032x}") for i in range(2))
    recorded = recorded_from_spans(without_ids([second, first]))
    assert [record.rollout.id for record in recorded] == [f"live-{i:032x}" for i in (1, 2)]
    named = [replace(span, rollout_id="mine", attempt_id="mine-1") for span in (first, second)]
    (record,) = recorded_from_spans(named)
    assert (record.rollout.id, record.attempts[0].id, len(record.spans)) == ("mine", "mine-1", 2)


def test_traces_with_the_same_response_are_one_rollout() -> None:
    """OpenInference's OpenAI instrumentation below LangChain's starts traces of its own."""
    spans = spans_from_file(SAMPLES / "openinference_langchain_and_openai.json")
    assert len({span.trace_id for span in spans}) == 4
    (record,) = recorded_from_spans(spans)
    report = Report()
    rows = list(transition_rows([record], ExportSettings(all_calls=True), report))
    assert [row["agent_name"] for row in rows] == ["calc"] * 3


def test_of_several_attempts_in_a_file_the_last_counts() -> None:
    tries = [replace(adapter_call(i, agent=f"try{i}"), attempt_id=f"r1-{i}") for i in (1, 2)]
    (record,) = recorded_from_spans(tries)
    rows = list(transition_rows([record], ExportSettings(all_calls=True), Report()))
    assert [row["agent_name"] for row in rows] == ["try2"]
