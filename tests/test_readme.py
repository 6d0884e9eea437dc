"""What the README shows is run: the diff against a real server, the commands against the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.serving import serving, tiny_engine

from agentlightning.reading import read_episode

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found, f"no {language} block"
    return found


def after(diff: str) -> str:
    """A diff as the file it makes."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))


def test_it_fits_on_a_few_screens() -> None:
    assert len(README.splitlines()) <= 200


def test_the_diff_is_short() -> None:
    (diff,) = blocks("diff")
    assert sum(line.startswith("+") for line in diff.splitlines()) <= 15


def test_the_diff_makes_an_agent_whose_run_is_recorded_and_rewarded(tmp_path: Path) -> None:
    (diff,) = blocks("diff")
    with serving(tiny_engine(tmp_path, context_length=2048), tmp_path) as server:
        environment = {
            "PATH": "",
            "AGENTLIGHTNING_URL": server.url,
            "AGENTLIGHTNING_KEY": server.key,
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OPENAI_API_KEY": server.key,
        }
        run = subprocess.run(
            [sys.executable, "-c", after(diff)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        (rollout,) = server.store.rollouts()
        (attempt,) = server.store.attempts(rollout.id)
        episode = read_episode(rollout, attempt, server.store.spans(rollout.id))
    assert episode.final_reward == 0.0, "a random model does not know where the order is"
    assert [t.agent_name for t in episode.transitions] == ["support"]


def test_the_agent_module_is_an_agent(tmp_path: Path) -> None:
    (source,) = blocks("python")
    (tmp_path / "my_agent.py").write_text(source)
    code = (
        "from agentlightning.runner.agent import load, takes_context; takes_context(load('my_agent:solve'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`(agl [^`]+|make [^`]+)`", README)
    return sorted({line for line in [*lines, *inline] if line})


@pytest.mark.parametrize("command", commands())
def test_every_command_exists_with_its_options(command: str) -> None:
    words = command.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert words[0] == "agl"
    agl = [sys.executable, "-m", "agentlightning_server.cli.main"]
    command_words = words[1:3] if words[1] == "export" else words[1:2]
    shown = subprocess.run(
        [*agl, *command_words, "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"COLUMNS": "200", "PATH": "", "NO_COLOR": "1", "TERM": "dumb"},
    ).stdout
    for word in words[2:]:
        if word.startswith("--"):
            assert word in shown
