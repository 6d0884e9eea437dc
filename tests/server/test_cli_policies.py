"""`agl` with several policies, selections and upstreams: the flow of tests/e2e from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.test_cli import AGL, ROOT, agl
from tests.support.chat_endpoint import ChatEndpoint
from tests.support.waiting import wait_until

from agentlightning_server.engines.embedded.tiny import make_tiny_model

FLOW = "tests.e2e.flow_agents:a_policy_each"
LORA = ("--policy", "writer", "--policy", "rewriter", "--lora-rank", "2")


def tasks(folder: Path) -> str:
    path = folder / "tasks.jsonl"
    path.write_text(json.dumps({"input": {"question": "Say something.", "checked_by": "hosted"}}) + "\n")
    return str(path)


def upstreams(folder: Path, endpoint: ChatEndpoint) -> str:
    path = folder / "upstreams.toml"
    path.write_text(f'[hosted]\nurl = "{endpoint.url}"\nmodel = "big"\n')
    return str(path)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_policies_of_a_flow_with_a_hosted_checker_are_trained_and_evaluated(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "m"))
    output = str(tmp_path / "run")
    with ChatEndpoint() as endpoint:
        common = ("--tasks", tasks(tmp_path), "--model", model, *LORA, "--json")
        common += ("--upstreams", upstreams(tmp_path, endpoint))
        trained = agl(
            "train",
            FLOW,
            *common,
            *("--steps", "2", "--tasks-per-step", "1", "--group-size", "4", "--learning-rate", "1e-2"),
            *("--output", output, "--agent", "*writer", "--select", "tests.e2e.test_flow:learns"),
        )
        result = result_of(trained)
        assert result["versions"] == {"writer": 2, "rewriter": 2}
        assert "version writer 2, rewriter 2" in trained.stderr
        assert (
            f"agl serve --checkpoint {result['checkpoint']} --model {model} --policy writer" in trained.stderr
        )
        assert {received.body["model"] for received in endpoint.received} == {"big"}
        assert len(endpoint.received) == 2 * 4

        checked = json.loads(agl("doctor", output, "--json").stdout)
        assert any(f["what"].startswith("batch of policy rewriter: 8 transitions") for f in checked), checked

        evaluated = result_of(
            agl("eval", FLOW, *common, "--checkpoint", output, "--output", str(tmp_path / "eval"))
        )
        assert evaluated["versions"] == evaluated["before"]["versions"] == {"writer": 2, "rewriter": 2}


def test_only_the_policy_that_is_named_is_trained(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "m"))
    with ChatEndpoint() as endpoint:
        trained = agl(
            "train",
            FLOW,
            *("--tasks", tasks(tmp_path), "--model", model, *LORA, "--train-policy", "rewriter", "--json"),
            *("--upstreams", upstreams(tmp_path, endpoint), "--output", str(tmp_path / "run")),
            *("--steps", "1", "--tasks-per-step", "1", "--group-size", "4"),
        )
    result = result_of(trained)
    assert result["versions"] == {"rewriter": 1}
    state = json.loads((Path(result["checkpoint"]) / "writer" / "state.json").read_text())
    assert state["version"] == 0


def test_serve_lists_all_policies_and_upstreams(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "m"))
    log = tmp_path / "log"
    with ChatEndpoint() as endpoint, log.open("w") as output:
        options = ["--model", model, "--port", "0", "--data", str(tmp_path / "data"), "--learn"]
        routed = {"AGENTLIGHTNING_UPSTREAMS": upstreams(tmp_path, endpoint)}
        process = subprocess.Popen(
            [*AGL, "serve", *options, *LORA, "--train-policy", "writer"],
            cwd=ROOT,
            stderr=output,
            env={**os.environ, "COLUMNS": "300", **routed},
        )
        try:
            wait_until(lambda: "OPENAI_API_KEY" in log.read_text(), timeout_s=60)
            found = re.search(r"OPENAI_BASE_URL=(\S+) OPENAI_API_KEY=(\S+)", log.read_text())
            assert found is not None
            models = httpx.get(f"{found[1]}/models", headers={"authorization": f"Bearer {found[2]}"})
            assert [m["id"] for m in models.json()["data"]] == ["writer", "rewriter", "hosted"]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--policy", "a", "--policy", "b"], r"2 policies \(a, b\) share one base model .* lora_rank"),
        (["--policy", "a", "--policy", "a", "--lora-rank", "2"], "several different ones"),
        (["--policy", "a", "--train-policy", "b"], r"--train-policy b is none of the policies \(a\)"),
        (["--select", "was_cut"], "names no selector: write MODULE:FUNCTION"),
        (["--upstreams", "none.json"], "cannot read the upstreams in none.json"),
        (["--upstreams", "policy.json"], "the upstream 'policy' has the name of a policy"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    make_tiny_model(tmp_path / "m")
    (tmp_path / "one.jsonl").write_text('"x"\n')
    (tmp_path / "policy.json").write_text('{"policy": {"url": "http://127.0.0.1:9/v1"}}')
    done = agl("train", FLOW, "--tasks", "one.jsonl", "--model", "m", *arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert re.search(sentence, re.sub(r"\s+", " ", done.stderr))
    assert "Traceback" not in done.stderr
