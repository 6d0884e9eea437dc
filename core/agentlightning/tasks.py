"""Task files: one JSON value a line. An object with an "input" field may also name its "id" and "split"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from agentlightning.errors import InvalidTaskFile
from agentlightning.types import Json, Task


def load_tasks(path: Path, *, split: str = "train") -> list[Task]:
    """Read a JSONL file of tasks; blank lines are skipped.

    A line is either {"input": ..., "id": ..., "split": ...}, where only "input" is required, or any other
    JSON value, which is the input itself. Raises InvalidTaskFile naming the file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON texts may hold
    except OSError as error:
        raise InvalidTaskFile(f"cannot read task file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidTaskFile(f"{path} is not UTF-8 text (byte {error.start})") from error
    tasks = [_task(path, number, line, split) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise InvalidTaskFile(f"{path} holds no task: write one JSON value a line")
    _refuse_duplicates(path, tasks)
    return tasks


def _task(path: Path, number: int, line: str, split: str) -> Task:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidTaskFile(f"{path}, line {number} is not JSON: {error}") from error
    fallback = f"{path.stem}-{number}"
    if not isinstance(value, Mapping) or "input" not in value:
        return Task(fallback, cast("Json", value), split)
    fields = cast("Mapping[str, Any]", value)
    task_id, own_split = fields.get("id", fallback), fields.get("split", split)
    if not isinstance(task_id, str | int) or not isinstance(own_split, str):
        raise InvalidTaskFile(f"{path}, line {number}: 'id' must be a string or number, 'split' a string")
    return Task(str(task_id), fields["input"], own_split)


def _refuse_duplicates(path: Path, tasks: list[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise InvalidTaskFile(f"{path}: two tasks have the id '{task.id}'; ids must be unique in a file")
        seen.add(task.id)
