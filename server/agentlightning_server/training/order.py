"""The order in which tasks are trained on: a function of seed and step alone, so that resume is exact."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence

from agentlightning.types import Task


def tasks_of_step(tasks: Sequence[Task], *, seed: int, step: int, count: int, round: int = 0) -> list[Task]:
    """The `count` tasks of a step: epoch after epoch, each epoch in its own seeded order.

    Steps take consecutive slices, so every task comes once per epoch. Further rounds of a step, of dynamic
    sampling, go through the other tasks in an order of the step's own, so that what one step adds does not
    move the tasks of the next; those that the step had already come last.
    """
    chosen: list[Task] = []
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, len(tasks))
        order = list(range(len(tasks)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        chosen.append(tasks[order[offset]])
    return _further(tasks, chosen, f"{seed}:step {step}", round) if round else chosen


def _further(tasks: Sequence[Task], had: Sequence[Task], seed: str, round: int) -> list[Task]:
    """As many tasks as the step had, for its first, second ... further round."""
    order = list(tasks)
    random.Random(seed).shuffle(order)
    seen = {task.id for task in had}
    order.sort(key=lambda task: task.id in seen)  # keeps the order within each half
    count = len(had)
    return [order[i % len(order)] for i in range((round - 1) * count, round * count)]


def digest_of(tasks: Sequence[Task]) -> str:
    """A short hash of the tasks' ids and inputs, in order."""
    text = json.dumps([[task.id, task.input] for task in tasks], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
