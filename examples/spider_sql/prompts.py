"""What the three agents are told: a sentence, worked examples as earlier turns, then the question.

The examples tell of databases that are not in Spider. A prompt is a list of messages as OpenAI's API takes
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Messages: TypeAlias = "list[dict[str, str]]"

WRITE = "Write one SQLite query that answers the question."
CHECK = "Does the query answer the question? Say yes or no."
REWRITE = "The query is wrong. Write one SQLite query that answers the question."
SCHEMA = "book(id, title, author, pages)\nreader(id, name, city)"
WRITTEN = (
    (SCHEMA, "How many books are there?", "SELECT count(*) FROM book"),
    ("plant(id, name, colour)\nbed(id, size)", "List the names of all plants.", "SELECT name FROM plant"),
    (SCHEMA, "What are the titles of books by Ito?", "SELECT title FROM book WHERE author = 'Ito'"),
    (
        "club(name, members)",
        "Show the clubs' names, largest first.",
        "SELECT name FROM club ORDER BY members DESC",
    ),
    (SCHEMA, "Show the name and city of each reader.", "SELECT name, city FROM reader"),
)
CHECKED = (
    ("How many books are there?", "SELECT count(*) FROM book", "count(*)\n5", "yes"),
    ("Show the city of each reader.", "SELECT town FROM reader", "Error: no such column: town", "no"),
    (
        "What are the titles of books by Ito?",
        "SELECT title FROM book WHERE author = 'ito'",
        "title\n(no rows)",
        "no",
    ),
    ("List the names of all plants.", "SELECT name FROM plant", "name\naster\npoppy", "yes"),
)
REWRITTEN = (
    (SCHEMA, "Show the city of each reader.", "SELECT town FROM reader", "Error: no such column: town",
     "SELECT city FROM reader"),
    (SCHEMA, "What are the titles of books by Ito?", "SELECT title FROM book WHERE author = 'ito'",
     "title\n(no rows)", "SELECT title FROM book WHERE author = 'Ito'"),
)  # fmt: skip


def to_write(schema: str, question: str) -> Messages:
    """The writer's prompt."""
    return _conversation(WRITE, ((_asked(s, q), query) for s, q, query in WRITTEN), _asked(schema, question))


def to_check(question: str, query: str, result: str) -> Messages:
    """The checker's."""
    examples = ((_shown(*shown), verdict) for *shown, verdict in CHECKED)
    return _conversation(CHECK, examples, _shown(question, query, result))


def to_rewrite(schema: str, question: str, query: str, result: str) -> Messages:
    """The rewriter's."""
    examples = ((f"Tables:\n{s}\n{_shown(*shown)}", better) for s, *shown, better in REWRITTEN)
    return _conversation(REWRITE, examples, f"Tables:\n{schema}\n{_shown(question, query, result)}")


def _asked(schema: str, question: str) -> str:
    return f"Tables:\n{schema}\nQuestion: {question}"


def _shown(question: str, query: str, result: str) -> str:
    return f"Question: {question}\nQuery: {query}\nResult: {result}"


def _conversation(system: str, examples: Iterable[tuple[str, str]], asked: str) -> Messages:
    messages: Messages = [{"role": "system", "content": system}]
    for question, answer in examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": asked}]
