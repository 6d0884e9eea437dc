"""`agl air` and `agl rescore` on stored rollouts, and the learning options of `agl train`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.server.test_cli import AGL, ROOT, SAY_E, agl, tasks
from tests.support.spans import agent_run, gateway_call, reward, tool
from tests.support.stores import store_server

from agentlightning.types import (
    AttemptStatus,
    Episode,
    Message,
    Mode,
    Rollout,
    Span,
    Task,
    ToolStatus,
    Transition,
)
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.store import Store


def first_call(episode: Episode) -> Mapping[Transition, float]:
    """A rule."""
    return {episode.transitions[0]: 0.2}


def every_other(episode: Episode) -> Mapping[Transition, float]:
    """A rule that makes rollouts of a group differ."""
    return {} if int(episode.rollout_id[-1]) % 2 else {episode.transitions[0]: 0.2}


def unfinished(_: Episode) -> Mapping[str, float]:
    """A rule with a mistake."""
    return {"nowhere": 0.1}


MINE = f"{__name__}:first_call"
GROUP = "run.train.0.0"


def asking(call_id: str) -> Message:
    function = {"name": "calculator", "arguments": "{}"}
    return {
        "role": "assistant",
        "content": "Let me see [bold]this[/bold].",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def calling(at: int, status: ToolStatus) -> list[Span]:
    """A writer that calls a tool and then answers."""
    run = agent_run(at, "writer", end_ns=at + 400)
    return [
        run,
        gateway_call(at + 10, [1, 2], [3], output=asking(f"c{at}"), parent_id=run.span_id),
        tool(at + 50, call_id=f"c{at}", status=status, parent_id=run.span_id),
        gateway_call(at + 100, [1, 2, 3, 4], [5, 6], parent_id=run.span_id),
    ]


def play(store: Store, rollout_id: str, spans: list[Span], **changes: Any) -> None:
    """A rollout that succeeded and left these spans."""
    store.enqueue([replace(Rollout(rollout_id, Task("t", {}), GROUP, Mode.TRAIN), **changes)])
    (claim,) = store.claim("w", 1)
    store.add_spans([replace(s, rollout_id=rollout_id, attempt_id=claim.attempt.id) for s in spans])
    store.finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: in one rollout a tool succeeded, in the other it raised; both earned nothing."""
    folder = tmp_path_factory.mktemp("run")
    with store_server(folder) as server:
        play(server.store, f"{GROUP}.0", [*calling(1000, ToolStatus.OK), reward(1500, 0.0)])
        play(server.store, f"{GROUP}.1", [*calling(2000, ToolStatus.RAISED), reward(2500, 0.0)])
        play(server.store, "run.val.0.0.0", [*calling(3000, ToolStatus.OK)], mode=Mode.VAL, group_id="v")
    return folder


def result(*arguments: str | Path) -> dict[str, Any]:
    done = agl(*map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- AIR -----------------------------------------------------------------------------------------


def test_the_rules_of_a_run_are_summed_up(run: Path) -> None:
    found = result("air", run, "--air-rule", MINE, "--air-bound", "0.2", "--air-fine", "0.1")
    assert found["rules"] == {
        "first_call": {"signals": 2, "episodes": 2, "value": 0.4, "counted": pytest.approx(0.2 / 1.5 + 0.2)},
        "tool_succeeded": {"signals": 1, "episodes": 1, "value": 0.1, "counted": pytest.approx(0.1 / 1.5)},
        "tool_raised": {"signals": 1, "episodes": 1, "value": -0.1, "counted": -0.1},
    }
    assert (found["episodes"], found["bound"], found["bounded_episodes"]) == (2, 0.2, 1)
    shown = agl("air", str(run)).stdout
    assert "tool_succeeded" in shown
    assert "2 episodes; the bound 0.3 acted in 0" in shown


def test_a_rollout_is_explained_call_by_call(run: Path) -> None:
    found = result("air", run, "--explain", f"{GROUP}.1", "--air-fine", "0.1")
    first, second = found["calls"]
    assert (first["agent_name"], first["tools"], second["tools"]) == ("writer", ["calculator"], [])
    (signal,) = first["signals"]
    assert (signal["rule"], signal["value"], signal["counted"]) == ("tool_raised", -0.1, -0.1)
    assert (signal["evidence"]["tool"], signal["evidence"]["status"]) == ("calculator", "raised")
    assert (first["total"], second["total"], found["total"]) == (-0.1, 0, -0.1)
    shown = agl("air", str(run), "--explain", f"{GROUP}.1", "--air-fine", "0.1").stdout
    assert "tool_raised" in shown
    assert "[bold]" in shown  # what agents say is no markup
    assert "final reward 0, AIR -0.1; the bound 0.3 did not act" in shown


def test_a_server_explains_as_the_folder_does(run: Path) -> None:
    with store_server(run) as server:
        live = result("air", "--server", server.url, "--key", server.key, "--explain", f"{GROUP}.0")
    assert live == result("air", run, "--explain", f"{GROUP}.0")


# --- rescoring -----------------------------------------------------------------------------------


def test_rescoring_shows_what_air_makes_of_a_group(run: Path) -> None:
    found = result("rescore", run, "--no-air", "--rollout", f"{GROUP}.0")
    assert found["groups"] == {"all": 1, "before": 1, "after": 0}
    writer = found["agents"]["writer"]
    assert (writer["before"]["calls"], writer["before"]["positive"]) == (4, 0.5)
    assert (writer["after"]["mean_return"], writer["after"]["positive"]) == (0.0, 0.0)
    assert [call["number"] for call in found["calls"]] == [0, 1]
    assert found["calls"][0]["before"]["returned"] == pytest.approx(0.1)
    assert found["calls"][0]["after"] == {"returned": 0.0, "advantage": 0.0}
    assert (found["settings"]["before"]["air"], found["settings"]["after"]["air"]) == (True, False)


def test_rescoring_takes_credit_estimator_and_selection(run: Path) -> None:
    options = ("--credit", "air_weighted", "--estimator", "grpo_no_std", "--by-agent", "--step-groups", "0.5")
    found = result("rescore", run, *options, "--air-rule", MINE, "--calls")
    assert len(found["calls"]) == 4
    first, second = (call["after"]["returned"] for call in found["calls"][:2])
    assert (first, second) == pytest.approx((0.6, 0.0))  # R + T r: 2 * (0.1 + 0.2)
    shown = agl("rescore", str(run), *options, "--agent", "writer")
    assert "groups with a difference to learn from: 1 of 1" in shown.stdout
    assert "-> " in shown.stdout
    assert "so the defaults stand for: air, air_rules" in shown.stderr


def test_neither_command_imports_torch(run: Path) -> None:
    for arguments in (("air", run), ("rescore", run, "--no-air")):
        command = [sys.executable, "-X", "importtime", *AGL[1:], *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "agentlightning.rescoring" in imported
        assert not imported & {"torch", "transformers"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["air", "RUN", "--explain", "nothing"], "there is no rollout nothing"),
        (
            ["air", "RUN", "--air-rule", f"{__name__}:unfinished"],
            "the AIR rule unfinished, on rollout run.train",
        ),
        (["air", "RUN", "--air-rule", "no_such_module:f"], "there is no module 'no_such_module'"),
        (["air"], "name the folder of a run"),
        (["rescore", "RUN", "--credit", "luck"], "unknown credit assignment 'luck'"),
        (["rescore", "RUN", "--agent", "nobody"], "agents seen: writer"),
        (["rescore", "RUN", "--rollout", "nothing"], "no call of a rollout nothing trains"),
        (["rescore", "nowhere"], "nowhere holds no run"),
        (["train", SAY_E, "--tasks", "x.jsonl", "--group-size", "1"], "--critic"),
        (["train", SAY_E, "--tasks", "x.jsonl", "--credit", "m:f"], "there is no module 'm'"),
    ],
)
def test_a_mistake_is_one_sentence(run: Path, arguments: list[str], sentence: str) -> None:
    done = agl(*(str(run) if argument == "RUN" else argument for argument in arguments))
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_takes_the_options_and_is_rescored_as_it_was(tmp_path: Path) -> None:
    model, output = str(make_tiny_model(tmp_path / "m")), tmp_path / "run"
    rule = f"{__name__}:every_other"
    common = ("train", SAY_E, "--tasks", tasks(tmp_path, "train.jsonl", 2), "--model", model, "--json")
    common += ("--output", str(output), "--steps", "1", "--tasks-per-step", "1", "--group-size", "4")
    learning = ("--no-air", "--air-rule", rule, "--air-bound", "0.3", "--normalise", "token", "--by-agent")
    learning += ("--estimator", "rloo", "--step-groups", "0.5", "--dynamic-rounds", "2")
    update = ("--kl", "0.01", "--kl-estimator", "k1", "--epochs", "2", "--minibatches", "2")
    update += ("--importance-cap", "2", "--clip-low", "0.1", "--clip-high", "0.3")
    trained = agl(*common, *learning, *update, "--credit", "air_weighted")
    assert trained.returncode == 0, trained.stderr
    named = json.loads((output / "run.json").read_text())
    kept = {"credit": "air_weighted", "estimator": "rloo", "normalise": "token", "by_agent": True}
    kept |= {"step_groups": 0.5, "air": False, "air_rules": [rule], "air_bound": 0.3, "air_fine": 0.0}
    assert {name: named[name] for name in kept} == kept
    (step,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {"kl_reference", "importance"} <= step["update"].keys()
    assert step["mean_return"] == pytest.approx(step["reward"] + 0.1, abs=1e-6)

    same = result("rescore", output, "--calls")
    assert same["groups"] == {"all": 1, "before": 1, "after": 1}
    assert all(call["before"] == call["after"] for call in same["calls"])
    assert {name: same["settings"]["before"][name] for name in kept} == kept

    other = agl(*common, *learning, "--credit", "identical")
    assert other.returncode == 1
    assert "credit was air_weighted, now identical" in other.stderr
    old = {name: value for name, value in named.items() if name != "credit"}  # of a run before they were kept
    (output / "run.json").write_text(json.dumps(old))
    assert agl(*common, *learning, "--credit", "identical").returncode == 0
    assert "so the defaults stand for: credit\n" in agl("rescore", str(output)).stderr


def test_a_critic_needs_no_group(tmp_path: Path) -> None:
    model, output = str(make_tiny_model(tmp_path / "m")), tmp_path / "run"
    common = ("train", SAY_E, "--tasks", tasks(tmp_path, "train.jsonl", 2), "--model", model, "--json")
    trained = agl(*common, "--output", str(output), "--steps", "1", "--group-size", "1", "--critic")
    assert trained.returncode == 0, trained.stderr
    (step,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert "value_loss" in step["update"]
