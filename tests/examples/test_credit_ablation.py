from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from examples.credit_ablation import results
from examples.credit_ablation.agent import END, HOPS, make_tasks, reading
from examples.credit_ablation.train import kinds
from tests.support.spans import attempt, gateway_call, reward, rollout, tool

from agentlightning.types import ToolStatus


def test_a_task_is_a_chain_of_notes_that_ends() -> None:
    for task in make_tasks(20, seed=1, split="train"):
        inputs: Any = task.input
        word = inputs["start"]
        for _ in range(HOPS):
            word = inputs["notes"][word]
        assert word == END


def test_tasks_are_the_same_each_time_and_others_in_another_split() -> None:
    first, again = (make_tasks(8, seed=3, split="train") for _ in range(2))
    assert first == again
    assert not {str(t.input) for t in first} & {str(t.input) for t in make_tasks(8, seed=3, split="val")}


def test_reading_a_note_that_is_not_there_fails() -> None:
    read = reading({"apple": "pear"})

    def run(word: str) -> Any:
        from autogen_core import CancellationToken

        return asyncio.run(read.run_json({"word": word}, CancellationToken()))

    assert run("apple") == "The note on apple says: pear"
    with pytest.raises(LookupError, match="no note on 'pear'"):
        run("pear")


def test_tool_calls_are_told_apart() -> None:
    from agentlightning.reading import read_episode

    spans = [
        gateway_call(100, [1], [2]),
        tool(150, arguments='{"word": "a"}'),
        tool(160, arguments='{"word": "a"}'),
        tool(170, arguments='{"word": "b"}'),
        tool(180, arguments='{"word": "c"}', status=ToolStatus.RAISED),
        reward(200, 0.0),
    ]
    found = kinds(read_episode(rollout(), attempt(), spans))
    assert found == {"new_note": 2, "same_note": 1, "failed": 1}


def records(credit: str, seed: int, final: float) -> dict[str, Any]:
    evaluations = [{"reward": 0.0, "rewards": {"t": 0.0}}, {"reward": final, "rewards": {"t": final}}]
    steps = [{"reward": 0.0}, {"reward": final}]
    habits = {"new_note": 1.0, "same_note": 0.0, "failed": 0.5}
    return {"credit": credit, "seed": seed, "evaluations": evaluations, "steps": steps, "habits": habits}


def test_the_table_compares_by_seed_with_student_intervals(tmp_path: Path) -> None:
    base = {seed: records("identical", seed, value) for seed, value in enumerate((0.0, 0.1, 0.2))}
    better = {seed: records("air", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))}
    line = results.row("air", better, base)
    # mean 0.6, standard deviation 0.1: 4.303 * 0.1 / sqrt(3) = 0.248; all three differences are 0.5
    assert "| 0.50 0.60 0.70 | 0.600 ± 0.248 | +0.500 ± 0.000 | 1.00 | 0.00 | 0.50 |" in line
    results.draw({"identical": base, "air": better}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
