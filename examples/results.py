"""Records of training runs -> the table and the curves in `results/`.

    python -m examples.calcx_math.results runs/calcx-easy-seed0 runs/calcx-easy-seed1 ...

Gains are paired by held-out problem; intervals are 95 %, by the normal approximation of the mean difference.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentlightning_server.training.plots import draw_curve
from agentlightning_server.training.reporting import EvalRecord, StepRecord, mean_and_stderr

RESULTS = Path(__file__).parent / "results"
Z95 = 1.96
HEAD = (
    "| seed | reward before → after | gain (95 %) | with intermediate reward | gain (95 %) "
    "| correct tool calls | wall |\n|---|---|---|---|---|---|---|"
)


def gain(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Mean difference over the same problems, with its interval."""
    mean, stderr = mean_and_stderr([after[task] - before[task] for task in before])
    return f"{mean:+.3f} ± {Z95 * stderr:.3f}"


def row(records: Mapping[str, Any]) -> str:
    """One line of the table."""
    before, after = records["evaluations"]
    return (
        f"| {records['seed']} | {before['reward']:.3f} → {after['reward']:.3f} "
        f"| {gain(before['rewards'], after['rewards'])} "
        f"| {before['mean_return']:.3f} → {after['mean_return']:.3f} "
        f"| {gain(before['returns'], after['returns'])} "
        f"| {before['tool_calls']:.2f} → {after['tool_calls']:.2f} | {records['wall_s'] / 60:.1f} min |"
    )


def draw(records: Mapping[str, Any]) -> None:
    """The curve of one run."""
    seed = records["seed"]
    draw_curve(
        RESULTS / f"seed{seed}.png",
        [StepRecord(**step) for step in records["steps"]],
        [EvalRecord(**evaluation) for evaluation in records["evaluations"]],
        title=f"Calc-X (easy), SmolLM2-135M-Instruct, GRPO, seed {seed}, commit {records['commit']}",
    )


def main() -> None:
    """Write the table, and copy records and curves beside it."""
    RESULTS.mkdir(exist_ok=True)
    table = [HEAD]
    for folder in map(Path, sys.argv[1:]):
        records = json.loads((folder / "records.json").read_text())
        table.append(row(records))
        shutil.copy(folder / "records.json", RESULTS / f"seed{records['seed']}.json")
        draw(records)
    (RESULTS / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
