"""Records of training runs -> the table and the curves in an example's `results/`.

    python -m examples.results runs/calcx-easy-seed0 runs/calcx-easy-seed1 ...

All of one example. Gains are paired by held-out task; intervals are 95 %, by the normal approximation of the
mean difference.
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

HERE = Path(__file__).parent
Z95 = 1.96
FORMAT = 0.1  # of MuSiQue's reward; an answer without its tags has none of either part
HEADS = {
    "calcx_math": "seed | reward before → after | gain (95 %) | with intermediate reward | gain (95 %) "
    "| correct tool calls | wall",
    "spider_sql": "seed | trained | execution match before → after | gain (95 %) | wall",
    "musique_rag": "seed | reward before → after | gain (95 %) | F1 | answer in its tags "
    "| searches that worked | wall",
}


def gain(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Mean difference over the same tasks, with its interval."""
    mean, stderr = mean_and_stderr([after[task] - before[task] for task in before])
    return f"{mean:+.3f} ± {Z95 * stderr:.3f}"


def row(records: Mapping[str, Any]) -> str:
    """One line of the table."""
    before, after = records["evaluations"]
    tool_calls = f"{before['tool_calls']:.2f} → {after['tool_calls']:.2f}"
    reward = f"{before['reward']:.3f} → {after['reward']:.3f} | {gain(before['rewards'], after['rewards'])}"
    wall = f"{records['wall_s'] / 60:.1f} min"
    if records["example"] == "spider_sql":
        return f"| {records['seed']} | {_agents(records)} | {reward} | {wall} |"
    if records["example"] == "musique_rag":
        (f1, form), (f1_after, form_after) = (_parts(record["rewards"]) for record in (before, after))
        parts = f"{f1:.3f} → {f1_after:.3f} | {form:.2f} → {form_after:.2f}"
        return f"| {records['seed']} | {reward} | {parts} | {tool_calls} | {wall} |"
    return (
        f"| {records['seed']} | {reward} | {before['mean_return']:.3f} → {after['mean_return']:.3f} "
        f"| {gain(before['returns'], after['returns'])} | {tool_calls} | {wall} |"
    )


def _agents(records: Mapping[str, Any]) -> str:
    trained = records["settings"]["agents"]
    return ", ".join(name for name in ("writer", "checker", "rewriter") if f"'{name}'" in trained)


def _parts(rewards: Mapping[str, float]) -> tuple[float, float]:
    """(mean F1, share of answers in their tags) of 0.9 · F1 + 0.1 · format."""
    tagged = [reward for reward in rewards.values() if reward > 0]
    f1 = sum((reward - FORMAT) / (1 - FORMAT) for reward in tagged)
    return f1 / len(rewards), len(tagged) / len(rewards)


def draw(records: Mapping[str, Any], file: Path) -> None:
    """The curve of one run."""
    draw_curve(
        file,
        [StepRecord(**step) for step in records["steps"]],
        [EvalRecord(**evaluation) for evaluation in records["evaluations"]],
        title=f"{records['example']}, SmolLM2-135M-Instruct, GRPO, seed {records['seed']}, "
        f"commit {records['commit']}",
    )


def main() -> None:
    """Write the table, and copy records and curves beside it."""
    table: list[str] = []
    results = HERE
    for folder in map(Path, sys.argv[1:]):
        records = json.loads((folder / "records.json").read_text())
        results = HERE / records["example"] / "results"
        results.mkdir(exist_ok=True)
        head = HEADS[records["example"]]
        table = table or [f"| {head} |\n|{'---|' * len(head.split('|'))}"]
        table.append(row(records))
        name = f"seed{records['seed']}"
        if records["example"] == "spider_sql":
            name = f"{_agents(records).replace(', ', '-')}-{name}"
        shutil.copy(folder / "records.json", results / f"{name}.json")
        draw(records, results / f"{name}.png")
    (results / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
