"""Answers for the supervised warm start: gold queries, and mistakes made on purpose with their verdict.

Every third question has a lesson for the rewriter and two for the checker, besides the writer's own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from agentlightning import Task
from examples.spider_sql.agent import SHOWN_ROWS
from examples.spider_sql.data import database
from examples.spider_sql.prompts import to_check, to_rewrite, to_write
from examples.spider_sql.sandbox import run
from examples.warm_start import Example

EVERY = 3


def lessons(tasks: Sequence[Task], *, seed: int = 0) -> list[Example]:
    """Examples for all three agents."""
    rng = random.Random(seed)
    examples: list[Example] = []
    for number, task in enumerate(tasks):
        assert isinstance(task.input, Mapping)
        question, gold, schema = (str(task.input[key]) for key in ("question", "query", "schema"))
        gold = tidy(gold)
        examples.append(Example(to_write(schema, question), gold))
        if number % EVERY == 0:
            file = database(str(task.input["database"]))
            wrong = mistaken(gold, schema, rng)
            shown = {query: run(query, file, limit=SHOWN_ROWS) for query in (gold, wrong)}
            examples.append(Example(to_rewrite(schema, question, wrong, shown[wrong]), gold))
            examples.append(Example(to_check(question, gold, shown[gold]), "yes"))
            examples.append(Example(to_check(question, wrong, shown[wrong]), "no"))
    return examples


def tidy(query: str) -> str:
    """One space between words, none before a comma."""
    return re.sub(r"\s+,", ",", re.sub(r"\s+", " ", query)).strip(" ;")


def mistaken(query: str, schema: str, rng: random.Random) -> str:
    """The query with one mistake: another column, a column that is not there, or a condition left out."""
    columns = re.findall(r"\w+(?=[,)])", schema)
    known = {column.lower() for column in columns}
    used = [word for word in re.findall(r"\w+", query) if word.lower() in known]
    if " where " in query.lower() and rng.random() < 0.3:
        return re.split(r"(?i) where ", query)[0]
    if not used:  # count(*) of a table, say
        return f"{query}_no"
    old = rng.choice(used)
    others = [column for column in columns if column.lower() != old.lower()]
    new = rng.choice(others) if others and rng.random() < 0.5 else f"{old}_{rng.choice(('id', 'no'))}"
    return re.sub(rf"\b{re.escape(old)}\b", new, query, count=1)
