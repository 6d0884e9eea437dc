from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.spans import adapter_call, agent_run, gateway_call, reward, user
from tests.support.stores import store_server

from agentlightning.types import AttemptStatus, Limits, Mode, Rollout
from agentlightning_server.store import Store

ROOT = Path(__file__).parents[2]
AGL = [sys.executable, "-m", "agentlightning_server.cli.main", "export", "transitions"]
SAMPLE = ROOT / "tests" / "core" / "foreign_traces" / "openinference_langchain.json"


def export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*AGL, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def fill(store: Store) -> None:
    """A rollout that succeeded with two calls of the policy and one of another model, and one that failed."""
    for rollout_id, status in (("r1", AttemptStatus.SUCCEEDED), ("r2", AttemptStatus.FAILED)):
        store.enqueue([Rollout(rollout_id, None, "g1", Mode.TRAIN, limits=Limits(max_attempts=1))])
        (claim,) = store.claim("w", 1)
        store.finish(claim.attempt.id, "w", status, "broke" if status is AttemptStatus.FAILED else None)
    run = agent_run(1, "writer", end_ns=900)
    store.add_spans(
        [
            run,
            gateway_call(10, [1, 2], [3], messages=[user("q")], parent_id=run.span_id),
            adapter_call(30, agent="checker", messages=[user("good?")]),
            gateway_call(50, [1, 2, 3, 4], [5, 6], messages=[user("again")], parent_id=run.span_id),
            reward(99, 1.0),
        ]
    )


def test_a_run_folder_and_a_live_server_give_the_same_rows(tmp_path: Path) -> None:
    with store_server(tmp_path) as server:
        fill(server.store)
        live = export("--server", server.url, "--key", server.key)
    stored = export(tmp_path)
    assert rows(live) == rows(stored)
    first, second = rows(stored)
    assert (first["prompt_ids"], first["response_ids"], second["response_ids"]) == ([1, 2], [3], [5, 6])
    assert [row["return"] for row in (first, second)] == [1.0, 1.0]
    assert "2 calls written, 2 of them with exact token ids" in stored.stderr
    assert "1 call without exact token ids left out" in stored.stderr
    assert "OPENAI_BASE_URL" in stored.stderr
    assert "1 x rollout failed" in stored.stderr


def test_selection_and_all_calls(tmp_path: Path) -> None:
    with store_server(tmp_path) as server:
        fill(server.store)
    assert [row["agent_name"] for row in rows(export(tmp_path, "--all-calls"))] == [
        "writer",
        "checker",
        "writer",
    ]
    assert [row["exact"] for row in rows(export(tmp_path, "--all-calls", "--agent", "check*"))] == [False]
    assert not rows(export(tmp_path, "--mode", "val"))


def test_a_foreign_trace_needs_no_server_and_no_store(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    done = export("--from-otlp", SAMPLE, "--output", output)
    assert (done.returncode, done.stdout) == (0, "")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["finish_reason"] for row in found] == ["tool_calls", "tool_calls", "stop"]
    assert [row["reward"] for row in found] == [0.1, 0.0, 0.0]  # AIR: one tool call succeeded, one failed
    assert {row["exact"] for row in found} == {False}
    assert '3 calls have "exact": false and no token ids' in done.stderr
    assert not rows(export("--from-otlp", SAMPLE, "--exact-only"))


def test_a_foreign_trace_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", *AGL[1:], "--from-otlp", str(SAMPLE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "agentlightning.export" in imported
    assert not imported & {"torch", "transformers"}


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    process = subprocess.Popen(
        [*AGL, "--from-otlp", str(SAMPLE)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Broken pipe" not in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one source"),
        (["runs/x", "--from-otlp", str(SAMPLE)], "name one source"),
        (["nowhere"], "nowhere holds no run"),
        (["--from-otlp", "nowhere.json"], "cannot read nowhere.json"),
        (["--from-otlp", str(ROOT / "Makefile")], "Makefile is not OTLP/JSON"),
        (["--from-otlp", str(SAMPLE), "--credit", "luck"], "unknown credit assignment 'luck'"),
        (["--from-otlp", str(SAMPLE), "--output", "/nowhere/x"], "/nowhere/x"),
    ],
)
def test_an_error_is_a_sentence(arguments: list[str], said: str) -> None:
    done = export(*arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
