"""A longer run on VeRL, kept as a result: does the mean reward rise?

    python -m tests.verl.learns results/verl_cpu [--steps 10]

A tiny random model, the agent of the tests (a tool call, then an answer), GRPO; the reward is the share of
letters and digits in the answer. Writes records.json and curve.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tests.verl.runs import SETTINGS, prepare, train

from agentlightning_server.training.machine import machine
from agentlightning_server.training.plots import draw_curve
from agentlightning_server.training.reporting import MetricsFile

HOURS_S = 3 * 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work", type=Path, help="folder of the run; a temporary one by default")
    args = parser.parse_args()
    folder = args.work or Path(tempfile.mkdtemp(prefix="verl-learns-"))
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    options = ["--steps", str(args.steps), "--checkpoint-every", "20", "--val", str(folder / "val.jsonl")]
    run = train(folder, *options, timeout_s=HOURS_S)
    metrics = MetricsFile(folder / "run" / "metrics.jsonl")
    evaluations = [e for e in (metrics.evaluation(0), metrics.evaluation(args.steps)) if e is not None]
    title = "VeRL and vLLM on a CPU: a tiny random Llama, GRPO, LangChain agent"
    draw_curve(args.output / "curve.png", metrics.steps(), evaluations, title=title)
    result = {name: value for name, value in run.result.items() if name != "checkpoint"}
    records = {**machine(), "settings": SETTINGS, "result": result, "records": metrics.read()}
    (args.output / "records.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
