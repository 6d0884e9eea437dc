from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.support.waiting import wait_until

from agentlightning.errors import Unavailable
from agentlightning_server.cli.training import run_id_of
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.store.queue import check_id
from agentlightning_server.training.local import only_server_of
from agentlightning_server.training.trainer import TrainSettings

ROOT = Path(__file__).parents[2]
AGL = [sys.executable, "-m", "agentlightning_server.cli.main"]
SAY_E = "tests.e2e.agents:say_e"


def agl(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AGL, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200, check=False
    )


def tasks(folder: Path, name: str, count: int) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"input": f"word {i}"}) + "\n" for i in range(count)))
    return str(path)


def test_train_doctor_and_eval_work_on_one_run(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "m"))
    output = str(tmp_path / "run")
    trained = agl(
        "train",
        SAY_E,
        *("--tasks", tasks(tmp_path, "train.jsonl", 4), "--val", tasks(tmp_path, "val.jsonl", 5)),
        *("--model", model, "--steps", "2", "--tasks-per-step", "2", "--group-size", "4"),
        *("--learning-rate", "1e-3", "--tracer", "light", "--output", output, "--json"),
    )
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout.splitlines()[-1])
    assert result["steps"] == 2
    assert result["before"]["held_out"] == result["after"]["held_out"] == 5
    assert Path(result["checkpoint"]).is_dir()
    assert "step   2/2  reward" in trained.stderr

    checked = agl("doctor", output, "--json")
    findings = json.loads(checked.stdout)
    assert checked.returncode == 0, findings
    assert any("have exact token ids" in finding["what"] for finding in findings)

    evaluated = agl(
        "eval",
        SAY_E,
        *("--tasks", str(tmp_path / "val.jsonl"), "--model", model),
        *("--output", str(tmp_path / "eval"), "--json"),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["before"]["held_out"] == 5


def test_runners_elsewhere_serve_a_training_run(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "m"))
    log = tmp_path / "log"
    command = [*AGL, "train", "--tasks", tasks(tmp_path, "train.jsonl", 2), "--model", model, "--json"]
    command += [
        "--steps",
        "1",
        "--tasks-per-step",
        "1",
        "--group-size",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    with log.open("w") as errors:
        trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    runner = None
    try:
        wait_until(lambda: "--key" in log.read_text(), timeout_s=60)
        found = re.search(r"--server (\S+) --key (\S+)", log.read_text())
        assert found is not None
        runner = subprocess.Popen([*AGL, "run", SAY_E, "--server", found[1], "--key", found[2]], cwd=ROOT)
        output, _ = trainer.communicate(timeout=120)
        assert json.loads(output)["steps"] == 1
    finally:
        trainer.kill()
        trainer.wait()
        if runner is not None:
            runner.send_signal(signal.SIGTERM)
            assert runner.wait(30) == 0


def test_serve_prints_how_to_reach_it_and_ends_on_a_signal(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "m"))
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*AGL, "serve", "--model", model, "--port", "0", "--data", str(tmp_path / "data"), "--learn"],
            cwd=tmp_path,
            stderr=output,
            env={**os.environ, "COLUMNS": "300"},
        )
    try:
        wait_until(lambda: "OPENAI_API_KEY" in log.read_text(), timeout_s=60)
        found = re.search(r"OPENAI_BASE_URL=(\S+) OPENAI_API_KEY=(\S+)", log.read_text())
        assert found is not None
        models = httpx.get(f"{found[1]}/models", headers={"authorization": f"Bearer {found[2]}"})
        assert models.json()["data"][0]["id"] == "policy"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert (tmp_path / "data" / "admin.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["train", SAY_E, "--tasks", "missing.jsonl"], 1, "cannot read task file missing.jsonl"),
        (["train", SAY_E], 2, "--tasks"),
        (["doctor", "nowhere"], 1, "nowhere holds no run"),
        (["doctor"], 1, "name the folder of a run"),
        (
            ["doctor", "--server", "http://127.0.0.1:9", "--key", "k"],
            1,
            "cannot be reached|Connection refused",
        ),
        (["serve", "--host", "0.0.0.0", "--data", "d"], 1, "refusing to listen on 0.0.0.0 without a key"),
        (["eval", "no.such:agent", "--tasks", "one.jsonl", "--model", "m"], 1, "no module"),
        (["eval", SAY_E, "--tasks", "broken.jsonl"], 1, "broken.jsonl, line 2 is not JSON"),
        (["eval", SAY_E, "--tasks", "one.jsonl", "--model", "./nothing"], 1, "nothing"),
        (
            ["train", SAY_E, "--tasks", "one.jsonl", "--output", "one.jsonl"],
            1,
            "one.jsonl: File exists; name",
        ),
        (["train", SAY_E, "--tasks", "one.jsonl", "--output", "one.jsonl/x"], 1, "x: Not a directory; name"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(
    tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    make_tiny_model(tmp_path / "m")
    (tmp_path / "one.jsonl").write_text('"x"\n')
    (tmp_path / "broken.jsonl").write_text('"x"\n{\n')
    done = agl(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert re.search(sentence, re.sub(r"\s+", " ", done.stderr))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("folder", "run_id"),
    [("runs/train", "train"), ("my run #1 ü", "my-run--1--"), (".hidden", "hidden"), ("/", "run")],
)
def test_any_folder_name_gives_a_run_id_that_fits_into_rollout_ids(folder: str, run_id: str) -> None:
    assert run_id_of(Path(folder)) == run_id
    assert check_id(f"{run_id}.train.0.0.0")


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        only_server_of(tmp_path),
        pytest.raises(Unavailable, match="another process trains or serves in"),
        only_server_of(tmp_path),
    ):
        pass
    with only_server_of(tmp_path):
        pass


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        TrainSettings(run_id="r", output=Path("x"), group_size=0)
    with pytest.raises(ValueError, match="steps must be zero or more"):
        TrainSettings(run_id="r", output=Path("x"), steps=-1)
