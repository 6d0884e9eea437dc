"""Tasks as VeRL reads data: those to train on in the order of `training.order`, without an end.

VeRL counts positions and saves how far it came with each checkpoint, so a run goes on with the task after the
last. The order itself is a function of seed and position.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUntypedBaseClass=false, reportUnknownArgumentType=false, reportMissingTypeArgument=false
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from agentlightning.types import Task
from agentlightning_server.training.order import tasks_of_step
from agentlightning_server.training.reporting import read_object, write_whole

ENDLESS = 1 << 40  # positions; VeRL stops by its number of steps


def write_tasks(path: Path, tasks: Sequence[Task], *, seed: int | None) -> Path:
    """Write tasks for `TaskDataset`; with a seed they come in its order for ever."""
    content = {"seed": seed, "tasks": [asdict(task) for task in tasks]}
    write_whole(path, json.dumps(content, ensure_ascii=False))
    return path


class TaskDataset(Dataset):
    """`data.custom_cls` of VeRL; reads the one file that `write_tasks` wrote."""

    def __init__(self, data_files: Any, *_: Any, **__: Any) -> None:
        path = data_files if isinstance(data_files, str) else next(iter(data_files))
        content = read_object(Path(path))
        self._seed: int | None = content["seed"]
        self._tasks = [Task(**task) for task in content["tasks"]]

    def __len__(self) -> int:
        return len(self._tasks) if self._seed is None else ENDLESS

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        task = self._tasks[position] if self._seed is None else self._drawn(position, self._seed)
        return {
            "raw_prompt": [{"role": "user", "content": task.id}],
            "index": position,
            "task": json.dumps(asdict(task), ensure_ascii=False),
            "data_source": "agentlightning",
            "dummy_tensor": torch.zeros(1, dtype=torch.uint8),  # VeRL expects one tensor at least
        }

    def _drawn(self, position: int, seed: int) -> Task:
        return tasks_of_step(self._tasks, seed=seed, step=position, count=1)[0]
