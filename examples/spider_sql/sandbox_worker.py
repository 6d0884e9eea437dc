"""The other process of the sandbox: runs one SQL query at a time and says what it gave.

Started as a script by `sandbox`, with the standard library alone. Requests and replies are lines of JSON:

    {"op": "match", "database", "gold", "predicted", "timeout_s"} -> {"ok"} or {"error"}, then {"match"}
    {"op": "rows", "database", "query", "limit", "timeout_s"}     -> {"columns", "rows"} or {"error"}

Invariants: the database is opened immutable and read-only, so no file changes, not even beside it; SQLite's
own authorizer lets nothing through but reading; a process that runs too long is ended by the kernel, with
or without its parent. How queries are compared is that of Spider's official evaluator (test-suite-sql-eval,
Zhong et al., 2020) at its default flags, on one database.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

try:
    import resource
except ImportError:  # Windows
    resource = None

Row: TypeAlias = tuple[Any, ...]

HEAP_BYTES = 256 << 20  # of SQLite; a query that wants more fails
PROCESS_BYTES = 1 << 30  # of address space, rows in Python included
ORPHAN_GRACE_S = 2.0  # after the time limit, when no parent is left to end this process
SHOWN_CHARACTERS = 200  # of one value in the rows that are shown

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_DENIED_FUNCTIONS = {"load_extension", "fts3_tokenizer"}
_QUERY_WORDS = {"select", "with", "values"}  # EXPLAIN is let through by the authorizer
_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?(?:\*/|\Z)|\s+           # what says nothing
    |'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]
    |\w+|.""",
    re.DOTALL | re.VERBOSE,
)
_THIS_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", re.IGNORECASE)


class NotAQuery(Exception):
    """The text is not exactly one statement that reads."""


# --- the text of a query -------------------------------------------------------------------------


def prepared(query: str) -> str:
    """The query as the official evaluator runs it: joined operators, no DISTINCT, years of its own time."""
    for apart, joined in (("> =", ">="), ("< =", "<="), ("! =", "!=")):
        query = query.replace(apart, joined)
    tokens = _one_statement(_TOKEN.findall(query))
    return "".join(token for token in tokens if token.lower() != "distinct")


def _one_statement(tokens: Sequence[str]) -> Sequence[str]:
    """The tokens of the only statement. Raises NotAQuery when there is none, a second, or one that writes."""
    end = tokens.index(";") if ";" in tokens else len(tokens)
    if any(token != ";" and not _silent(token) for token in tokens[end:]):
        raise NotAQuery("there is more than one statement")
    first = next((token for token in tokens[:end] if not _silent(token)), "")
    if first.lower() not in _QUERY_WORDS:
        raise NotAQuery("only a query that reads is allowed: SELECT, WITH or VALUES")
    return tokens[:end]


def _silent(token: str) -> bool:
    return token.isspace() or token.startswith(("--", "/*"))


# --- running it ----------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(uri: str) -> Generator[sqlite3.Connection]:
    """A connection that can read this database and do nothing else."""
    connection = sqlite3.connect(uri, uri=True)
    try:
        connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
        connection.execute("PRAGMA temp_store = MEMORY")  # a sort that fills the heap, not the disk
        connection.execute("PRAGMA schema_version")  # fails where the file is no database
        connection.text_factory = _text
        connection.set_authorizer(_authorized)
        yield connection
    finally:
        connection.close()


def _text(value: bytes) -> str:
    return value.decode(errors="ignore")


def _authorized(action: int, _first: str | None, second: str | None, *_: Any) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _DENIED_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def rows_of(connection: sqlite3.Connection, query: str, limit: int | None = None) -> list[Row]:
    """All rows of a prepared query, or the first `limit`."""
    cursor = connection.execute(_THIS_YEAR.sub("2020", query))
    return cursor.fetchall() if limit is None else cursor.fetchmany(limit)


# --- comparing results ---------------------------------------------------------------------------


def same_result(gold: Sequence[Row], predicted: Sequence[Row], *, ordered: bool) -> bool:
    """Whether some order of the columns makes the results equal: as lists when ordered, else as bags of rows.

    Two empty results are equal whatever their columns, 1 equals 1.0, and '1' equals neither.
    """
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    if not _same_rows_of_values(gold, predicted, ordered=ordered):
        return False
    if ordered:
        return Counter(zip(*gold, strict=True)) == Counter(zip(*predicted, strict=True))
    wanted = sorted(zip(*gold, strict=True), key=lambda column: -len(set(column)))
    none = [0] * len(gold)
    return _assignable(wanted, list(zip(*predicted, strict=True)), none, none)


def _same_rows_of_values(gold: Sequence[Row], predicted: Sequence[Row], *, ordered: bool) -> bool:
    """The official evaluator's quick check of rows whose values are sorted.

    It sorts by what a value looks like, so it tells a row of 1 and 1.5 from one of 1.0 and 1.5, which the
    full comparison would not. Kept, for the sake of the same score.
    """
    a, b = ([tuple(sorted(row, key=_looks)) for row in rows] for rows in (gold, predicted))
    return a == b if ordered else set(a) == set(b)


def _looks(value: Any) -> str:
    return f"{value}{type(value)}"


def _assignable(wanted: list[Row], free: list[Row], of_gold: list[int], of_predicted: list[int]) -> bool:
    """Whether each wanted column can be given one of the free ones so that the bags of rows are equal.

    `of_gold` and `of_predicted` number the rows by their values in the columns assigned so far: equal
    numbers, equal values.
    """
    if not wanted:
        return True
    tried: set[Row] = set()
    for i, column in enumerate(free):
        if column in tried:
            continue
        tried.add(column)
        numbers: dict[tuple[int, Any], int] = {}
        a = [numbers.setdefault(pair, len(numbers)) for pair in zip(of_gold, wanted[0], strict=True)]
        b = [numbers.setdefault(pair, len(numbers)) for pair in zip(of_predicted, column, strict=True)]
        if Counter(a) == Counter(b) and _assignable(wanted[1:], free[:i] + free[i + 1 :], a, b):
            return True
    return False


# --- requests ------------------------------------------------------------------------------------


def match(request: dict[str, Any]) -> None:
    """Say whether gold runs; if it does, whether the predicted query gives the same."""
    _limit(request)
    try:
        gold = prepared(request["gold"])
        with opened(request["database"]) as connection:
            wanted = rows_of(connection, gold)
    except Exception as error:
        return _reply(error=_said(error))
    _reply(ok=True)
    _limit(request)
    try:
        with opened(request["database"]) as connection:
            found = rows_of(connection, prepared(request["predicted"]), len(wanted) + 1)
        equal = same_result(wanted, found, ordered="order by" in gold.lower())
    except Exception:
        equal = False
    return _reply(match=equal)


def rows(request: dict[str, Any]) -> None:
    """Say what a query gives, at most `limit` rows of it, values cut short."""
    _limit(request)
    try:
        with opened(request["database"]) as connection:
            cursor = connection.execute("".join(_one_statement(_TOKEN.findall(request["query"]))))
            found = cursor.fetchmany(request["limit"])
            columns = [column[0] for column in cursor.description]
            shown = [[str(value)[:SHOWN_CHARACTERS] for value in row] for row in found]
            size = max((len(row) for row in shown), default=0)
    except Exception as error:
        return _reply(error=_said(error))
    return _reply(columns=columns[: size or None], rows=shown)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _reply(**reply: Any) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def _limit(request: dict[str, Any]) -> None:
    """From now on, so long until the kernel ends this process."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + ORPHAN_GRACE_S)


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    if resource is not None:
        with contextlib.suppress(ValueError, OSError):  # macOS
            resource.setrlimit(resource.RLIMIT_AS, (PROCESS_BYTES, PROCESS_BYTES))
    sys.setrecursionlimit(5000)  # a result may have 2000 columns
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _reply(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            (match if request["op"] == "match" else rows)(request)
        finally:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
