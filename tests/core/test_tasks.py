from __future__ import annotations

from pathlib import Path

import pytest

from agentlightning.errors import InvalidTaskFile
from agentlightning.tasks import load_tasks


def written(folder: Path, text: str) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text(text)
    return path


def test_lines_are_tasks_with_or_without_an_id(tmp_path: Path) -> None:
    path = written(tmp_path, '{"input": {"q": 1}, "id": 7, "split": "x"}\n\n"just text"\n{"q": 2}\n')
    tasks = load_tasks(path)
    assert [(t.id, t.input, t.split) for t in tasks] == [
        ("7", {"q": 1}, "x"),
        ("tasks-3", "just text", "train"),
        ("tasks-4", {"q": 2}, "train"),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"input": 1}\n{"input": \n', "line 2 is not JSON"),
        ('{"input": 1, "id": []}\n', "line 1: 'id' must be"),
        ('{"input": 1, "id": "a"}\n{"input": 2, "id": "a"}\n', "two tasks have the id 'a'"),
        ("\n", "holds no task"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InvalidTaskFile, match=sentence):
        load_tasks(written(tmp_path, text))


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidTaskFile, match="cannot read"):
        load_tasks(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidTaskFile, match="not UTF-8"):
        load_tasks(tmp_path / "b.jsonl")


def test_a_separator_that_json_texts_may_hold_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"input": "a\u2028b"}\r\n{"input": "c"}\n', encoding="utf-8", newline="")
    assert [task.input for task in load_tasks(path)] == ["a\u2028b", "c"]
