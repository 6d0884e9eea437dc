"""Numbers beside the training run: trivial baselines, and the agents with the base model or a checkpoint.

    python -m examples.spider_sql.evaluate                                     # baselines only
    python -m examples.spider_sql.evaluate --agent [--checkpoint runs/spider-warm-simple-200-lora0]

A baseline sees the question and the schema, and always writes the same kind of query.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from agentlightning import Task
from agentlightning_server.training import EmbeddedSettings
from examples.reporting import agent_score
from examples.spider_sql.data import Subset, database, load
from examples.spider_sql.reward import execution_match


def _tables(schema: str) -> list[tuple[str, list[str]]]:
    found = re.findall(r"^(\w+)\((.*)\)$", schema, re.MULTILINE)
    return [(name, columns.split(", ")) for name, columns in found]


def _named(question: str, schema: str) -> tuple[str, list[str]]:
    """The first table that the question names, else the first of all, with those columns that it names."""
    words = question.lower()
    tables = _tables(schema)
    table, columns = next((t for t in tables if t[0].lower().rstrip("s") in words), tables[0])
    return table, [column for column in columns if column.lower().replace("_", " ") in words] or columns[:1]


def _columns(question: str, schema: str) -> str:
    table, columns = _named(question, schema)
    return f"SELECT {', '.join(columns)} FROM {table}"


def _count_or_columns(question: str, schema: str) -> str:
    table, _ = _named(question, schema)
    counting = re.search(r"(?i)\bhow many\b|\bnumber of\b|\bcount\b", question)
    return f"SELECT count(*) FROM {table}" if counting else _columns(question, schema)


BASELINES: Mapping[str, Callable[[str, str], str]] = {
    "count(*) of the first table": lambda _, schema: f"SELECT count(*) FROM {_tables(schema)[0][0]}",
    "* of the first table": lambda _, schema: f"SELECT * FROM {_tables(schema)[0][0]}",
    "columns that the question names, of the table that it names": _columns,
    "the same, but count(*) for how many": _count_or_columns,
}


def baseline(tasks: Sequence[Task], write: Callable[[str, str], str]) -> float:
    """Mean reward of always writing this kind of query."""
    right = 0
    for task in tasks:
        assert isinstance(task.input, Mapping)
        question, schema, gold = (str(task.input[name]) for name in ("question", "schema", "query"))
        right += execution_match(write(question, schema), gold, database(str(task.input["database"])))
    return right / len(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subset", default="simple", choices=get_args(Subset))
    parser.add_argument("--agent", action="store_true", help="run the agents too")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of a training run; none: the base model")
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("runs/spider-evaluate"))
    args = parser.parse_args()
    questions = load(args.subset, held_out=args.held_out)
    line: dict[str, Any] = {"questions": questions.source, "held_out": len(questions.held_out)}
    line["baselines"] = {
        name: round(baseline(questions.held_out, write), 4) for name, write in BASELINES.items()
    }
    if args.agent:
        line["agent"] = agent_score(
            "examples.spider_sql.agent:solve",
            questions.held_out,
            EmbeddedSettings(context_length=1024),
            args.output / time.strftime("%Y%m%d-%H%M%S"),
            args.checkpoint,
        )
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
