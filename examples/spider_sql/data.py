"""Questions and databases of Spider: from `../shared/data/spider`, else the public hub, else a small sample.

Spider (Yu et al., 2018) is licensed CC BY-SA 4.0; none of it is part of this repository. Questions of one
database stand on one side of the split only, as in Spider itself: most have a near-copy in their database.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from agentlightning import Task
from examples.spider_sql import hub, sample

Subset = Literal["simple", "single-table", "spider", "sample"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "spider"
SPLIT_SEED = 1234
SHORT_SCHEMA = 250  # characters of the schema as the agent reads it; longer ones do not fit a small model
HELD_OUT_DATABASES = 0.3  # of the databases that have such questions

_MORE_THAN_ONE_TABLE = re.compile(r"\b(join|union|intersect|except)\b|\bfrom\b.*\bfrom\b", re.IGNORECASE)
_SIMPLE = re.compile(
    r"select (count\(\*\)|(distinct )?\w+( ?, ?\w+)*) from \w+"
    r"( where \w+ ?(=|>|<|>=|<=|!=) ?('[^']*'|\"[^\"]*\"|[\d.]+))?( order by \w+( asc| desc)?)?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Questions:
    """Training and held-out questions, and where they came from."""

    train: Sequence[Task]
    held_out: Sequence[Task]
    source: str


def load(subset: Subset = "simple", *, held_out: int = 120) -> Questions:
    """Questions of a subset, split by database. Each input has question, query (gold), database and schema.

    "simple": one table, at most one condition and one order, no aggregate but count(*), a database with a
    short schema; "single-table": any query of one table, of a database with a short schema; "spider": all;
    "sample": three small databases that ship, no download. Without a network any subset falls back to the
    sample, and `source` says so.
    """
    if subset == "sample":
        return _sample(held_out)
    try:
        rows, source = _rows()
        tasks = [_task(row, number) for number, row in enumerate(rows) if _belongs(row, subset)]
    except OSError as error:
        questions = _sample(held_out)
        return Questions(
            questions.train, questions.held_out, f"{questions.source} ({subset} unavailable: {error})"
        )
    train, test = split_by_database(tasks, held_out)
    return Questions(train, test, f"Spider ({subset}), {source}")


def database(name: str) -> Path:
    """The SQLite file of a database."""
    if name in sample.SCHEMAS:
        return sample.database(name)
    shared = SHARED / "database" / name / f"{name}.sqlite"
    return shared if shared.exists() else hub.database(name)


@cache
def schema(name: str) -> str:
    """The tables and columns of a database, one line for each table: singer(id, name, age)."""
    connection = sqlite3.connect(f"{database(name).absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        tables = [table for (table,) in connection.execute(query)]
        lines: list[str] = []
        for table in tables:
            columns = connection.execute("SELECT name FROM pragma_table_info(?)", (table,))
            lines.append(f"{table}({', '.join(column for (column,) in columns)})")
    finally:
        connection.close()
    return "\n".join(lines)


def split_by_database(tasks: Sequence[Task], held_out: int) -> tuple[list[Task], list[Task]]:
    """(train, held out): whole databases go to one side or the other, in seeded order."""
    names = sorted({_database_of(task) for task in tasks})
    random.Random(SPLIT_SEED).shuffle(names)
    kept = set(names[round(len(names) * HELD_OUT_DATABASES) :])
    shuffled = list(tasks)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    train = [task for task in shuffled if _database_of(task) in kept]
    test = [task for task in shuffled if _database_of(task) not in kept]
    return train, test[:held_out]


def _database_of(task: Task) -> str:
    assert isinstance(task.input, Mapping)
    return str(task.input["database"])


def _rows() -> tuple[list[dict[str, Any]], str]:
    """All questions whose database is to be had, and the name of the source."""
    files = [SHARED / "train_spider.json", SHARED / "dev.json"]
    source = "shared data"
    if not all(file.exists() for file in files):
        files, source = hub.questions(), hub.SOURCE
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))], source


def _belongs(row: Mapping[str, Any], subset: Subset) -> bool:
    query = re.sub(r"\s+", " ", row["query"]).strip(" ;")
    if subset == "spider":
        return True
    if subset == "simple":
        return bool(_SIMPLE.fullmatch(query)) and len(schema(row["db_id"])) <= SHORT_SCHEMA
    return not _MORE_THAN_ONE_TABLE.search(query) and len(schema(row["db_id"])) <= SHORT_SCHEMA


def _task(row: Mapping[str, Any], number: int) -> Task:
    name = row["db_id"]
    question = re.sub(r"\s+", " ", row["question"]).strip()
    given = {"question": question, "query": row["query"], "database": name, "schema": schema(name)}
    return Task(f"spider-{number}", given)


def _sample(held_out: int) -> Questions:
    tasks = {
        split: [
            Task(
                f"sample-{split}-{i}",
                {"question": q, "query": query, "database": name, "schema": schema(name)},
            )
            for i, (name, q, query) in enumerate(sample.QUESTIONS)
            if (name == sample.HELD_OUT) == (split == "test")
        ]
        for split in ("train", "test")
    }
    return Questions(tasks["train"], tasks["test"][:held_out], "the sample that ships")
