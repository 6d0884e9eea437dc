"""Three small databases and their questions, made for this example: they need no download.

They also show the agent how a question is answered: see `agent.EXAMPLES`.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from functools import cache
from pathlib import Path

SCHEMAS = {
    "library": """
        CREATE TABLE book (id INTEGER, title TEXT, author TEXT, pages INTEGER);
        INSERT INTO book VALUES (1, 'Low Tide', 'Ito', 210), (2, 'The Ferry', 'Braun', 340),
            (3, 'Salt', 'Ito', 128), (4, 'North', 'Okafor', 512), (5, 'Harbour', 'Braun', 295);
        CREATE TABLE reader (id INTEGER, name TEXT, city TEXT);
        INSERT INTO reader VALUES (1, 'Mia', 'Oslo'), (2, 'Jon', 'Bergen'), (3, 'Lea', 'Oslo');""",
    "garden": """
        CREATE TABLE plant (id INTEGER, name TEXT, colour TEXT, height INTEGER);
        INSERT INTO plant VALUES (1, 'aster', 'blue', 60), (2, 'poppy', 'red', 45), (3, 'iris', 'blue', 80),
            (4, 'rose', 'red', 120);
        CREATE TABLE bed (id INTEGER, name TEXT, size INTEGER);
        INSERT INTO bed VALUES (1, 'south', 12), (2, 'wall', 5);""",
    "race": """
        CREATE TABLE runner (id INTEGER, name TEXT, country TEXT, age INTEGER);
        INSERT INTO runner VALUES (1, 'Ana', 'Spain', 31), (2, 'Bo', 'Sweden', 27), (3, 'Cem', 'Turkey', 24),
            (4, 'Dai', 'Japan', 35), (5, 'Eve', 'Sweden', 29);
        CREATE TABLE club (id INTEGER, name TEXT, members INTEGER);
        INSERT INTO club VALUES (1, 'Harriers', 120), (2, 'Striders', 75), (3, 'Milers', 60);""",
}
HELD_OUT = "race"
QUESTIONS = (  # database, question, gold query
    ("library", "How many books are there?", "SELECT count(*) FROM book"),
    ("library", "List the titles of all books.", "SELECT title FROM book"),
    ("library", "What are the titles of books by Ito?", "SELECT title FROM book WHERE author = 'Ito'"),
    ("library", "Show all books' titles, longest first.", "SELECT title FROM book ORDER BY pages DESC"),
    ("library", "Which authors wrote books of over 300 pages?", "SELECT author FROM book WHERE pages > 300"),
    ("library", "How many readers live in Oslo?", "SELECT count(*) FROM reader WHERE city = 'Oslo'"),
    ("library", "List the names and cities of readers.", "SELECT name, city FROM reader"),
    ("garden", "How many plants are there?", "SELECT count(*) FROM plant"),
    ("garden", "What are the names of the blue plants?", "SELECT name FROM plant WHERE colour = 'blue'"),
    ("garden", "List the names of plants by height.", "SELECT name FROM plant ORDER BY height"),
    ("garden", "What are the sizes of the beds?", "SELECT size FROM bed"),
    ("garden", "How high is the rose?", "SELECT height FROM plant WHERE name = 'rose'"),
    ("garden", "Show the names of beds larger than 10.", "SELECT name FROM bed WHERE size > 10"),
    ("race", "How many runners are there?", "SELECT count(*) FROM runner"),
    ("race", "Show the names of all runners.", "SELECT name FROM runner"),
    ("race", "List the names of runners from Sweden.", "SELECT name FROM runner WHERE country = 'Sweden'"),
    ("race", "What are the ages of the runners, oldest first?", "SELECT age FROM runner ORDER BY age DESC"),
    ("race", "How many clubs have more than 70 members?", "SELECT count(*) FROM club WHERE members > 70"),
    ("race", "Show the name and country of each runner.", "SELECT name, country FROM runner"),
    ("race", "What are the names of the clubs?", "SELECT name FROM club"),
    ("race", "Which runners are younger than 28?", "SELECT name FROM runner WHERE age < 28"),
)


@cache
def database(name: str) -> Path:
    """The SQLite file of a sample database, made where it does not exist yet."""
    folder = Path(tempfile.gettempdir()) / f"agentlightning-spider-sample-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / f"{name}.sqlite"
    if not file.exists():
        unfinished = folder / f"{name}.{os.getpid()}"
        unfinished.unlink(missing_ok=True)
        connection = sqlite3.connect(unfinished)
        connection.executescript(SCHEMAS[name])
        connection.close()
        unfinished.replace(file)
    return file
