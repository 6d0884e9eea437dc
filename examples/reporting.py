"""What a training run of an example leaves behind (curve, records, JSON), and an agent's score."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from agentlightning import Task
from agentlightning_server.cli.progress import ProgressReporter
from agentlightning_server.training import (
    EmbeddedSettings,
    RunnerSettings,
    TrainResult,
    TrainSettings,
    train_locally,
)
from agentlightning_server.training.machine import machine
from agentlightning_server.training.plots import draw_curve


def report(
    result: TrainResult, output: Path, args: argparse.Namespace, *, example: str, title: str, wall_s: float
) -> None:
    """Write `curve.png` and `records.json` to the run's folder; print the line."""
    evaluations = [e for e in (result.before, result.after) if e is not None]
    draw_curve(output / "curve.png", result.steps, evaluations, title=title)
    records = {
        "example": example,
        "seed": args.seed,
        "settings": {name: str(value) for name, value in vars(args).items()},
        **machine(),
        "wall_s": round(wall_s, 1),
        "steps": [asdict(record) for record in result.steps],
        "evaluations": [asdict(record) for record in evaluations],
    }
    (output / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    before, after = result.before, result.after
    line = {
        "example": example,
        "seed": args.seed,
        "steps": args.steps,
        "before": round(before.reward, 4) if before else None,
        "after": round(after.reward, 4) if after else None,
        "tool_calls_before": round(before.tool_calls, 4) if before else None,
        "tool_calls_after": round(after.tool_calls, 4) if after else None,
        "held_out": before.held_out if before else 0,
        "wall_s": round(wall_s, 1),
    }
    print(json.dumps(line), flush=True)


def agent_score(
    agent: str, tasks: Sequence[Task], engine: EmbeddedSettings, output: Path, checkpoint: Path | None
) -> dict[str, float]:
    """What the agent (MODULE:FUNCTION) earns on the tasks, with the base model or a checkpoint."""
    training = TrainSettings(run_id=output.name, output=output, steps=0)
    with ProgressReporter(0) as reporter:
        result = train_locally(
            RunnerSettings(agent, concurrency=64),
            training,
            engine,
            train=[],
            held_out=tasks,
            reporter=reporter,
            checkpoint=checkpoint,
        )
    before = result.before
    assert before is not None
    return {"reward": before.reward, "stderr": before.stderr, "tool_calls": before.tool_calls}
