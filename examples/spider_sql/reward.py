"""How good a query is: whether it gives what the gold query gives, on one database.

The semantics are those of Spider's official evaluator, test-suite-sql-eval at its default flags, with two
differences. It never writes: the official one runs a predicted DROP TABLE for good. And it counts exactly one
statement that reads; the official one runs the first of several. A single database cannot tell every wrong
query from a right one, so this is not the leaderboard's test-suite accuracy.
"""

from __future__ import annotations

from pathlib import Path

from examples.spider_sql import sandbox

TIMEOUT_S = 30.0


def execution_match(predicted: str, gold: str, database: Path, *, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether `predicted` gives the same result as `gold`.

    Columns may come in another order; rows too, unless gold has ORDER BY; DISTINCT is ignored in both. False
    for anything but one query that reads, for an error, and after `timeout_s`, when the query is killed.
    Raises InvalidInput when the database is missing or gold itself does not run.
    """
    return sandbox.match(predicted, gold, Path(database), timeout_s)
