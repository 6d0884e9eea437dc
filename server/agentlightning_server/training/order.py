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
    sampling, have orders of their own, so that what one step adds does not move the tasks of the next.
    """
    chosen: list[Task] = []
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, len(tasks))
        order = list(range(len(tasks)))
        random.Random(f"{seed}:{epoch}" + (f":{round}" if round else "")).shuffle(order)
        chosen.append(tasks[order[offset]])
    return chosen


def digest_of(tasks: Sequence[Task]) -> str:
    """A short hash of the tasks' ids and inputs, in order."""
    text = json.dumps([[task.id, task.input] for task in tasks], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
