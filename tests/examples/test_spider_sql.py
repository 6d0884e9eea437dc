from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from examples.spider_sql import sandbox
from examples.spider_sql.data import load, split_by_database
from examples.spider_sql.lessons import lessons, mistaken
from examples.spider_sql.reward import execution_match
from examples.spider_sql.sample import QUESTIONS, database

from agentlightning import Task
from agentlightning.errors import InvalidInput

COUNT = "SELECT count(*) FROM runner"
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
CARTESIAN = f"SELECT count(*) FROM {', '.join(f'runner r{i}' for i in range(30))}"


@pytest.fixture
def race(tmp_path: Path) -> Path:
    """A database of its own, which a test may damage."""
    return Path(shutil.copy(database("race"), tmp_path / "race.sqlite"))


# Scores of the official evaluator (test-suite-sql-eval, e97acc54) at its default flags on this database.
OFFICIAL = [
    (COUNT, COUNT, 1),
    ("SELECT count(id) FROM runner", COUNT, 1),
    ("SELECT 5", COUNT, 1),
    ("SELECT 5.0", COUNT, 1),
    ("SELECT '5'", COUNT, 0),
    ("SELECT count(*) FROM club", COUNT, 0),
    ("SELECT name, country FROM runner", "SELECT country, name FROM runner", 1),
    ("SELECT name FROM runner", "SELECT name, country FROM runner", 0),
    ("SELECT name FROM runner ORDER BY age", "SELECT name FROM runner", 1),
    ("SELECT name FROM runner", "SELECT name FROM runner ORDER BY age", 0),
    ("SELECT name FROM runner ORDER BY age DESC", "SELECT name FROM runner ORDER BY age", 0),
    ("SELECT name, age FROM runner ORDER BY age", "SELECT age, name FROM runner ORDER BY age", 1),
    ("SELECT country FROM runner", "SELECT DISTINCT country FROM runner", 1),
    ("SELECT count(DISTINCT country) FROM runner", "SELECT count(country) FROM runner", 1),
    ("SELECT country FROM runner GROUP BY country", "SELECT country FROM runner", 0),
    ("SELECT name FROM runner WHERE age > = 30", "SELECT name FROM runner WHERE age >= 30", 1),
    (
        "SELECT name FROM runner WHERE country = 'sweden'",
        "SELECT name FROM runner WHERE country = 'Sweden'",
        0,
    ),
    ("SELECT name FROM runner WHERE age > 99", "SELECT id, age FROM runner WHERE age > 99", 1),
    ("SELECT 1, 2 UNION ALL SELECT 2, 1", "SELECT 2, 1 UNION ALL SELECT 1, 2", 1),
    ("SELECT 1, 4 UNION ALL SELECT 3, 2", "SELECT 1, 2 UNION ALL SELECT 3, 4", 0),
    ("SELECT 1.0, 1.5", "SELECT 1, 1.5", 0),
    ("SELECT x'61'", "SELECT 'a'", 0),
    ("SELECT 2020", "SELECT YEAR(CURDATE())", 1),
    ("SELECT nme FROM runner", "SELECT name FROM runner", 0),
    ("what is this", COUNT, 0),
    (COUNT + ";", COUNT, 1),
    (COUNT + " ;; -- the end", COUNT, 1),
    ("-- how many\n" + COUNT, COUNT, 1),
    ("SELECT ';' /* ; */", "SELECT ';'", 1),
]


@pytest.mark.parametrize(("predicted", "gold", "score"), OFFICIAL)
def test_scores_are_those_of_the_official_evaluator(
    predicted: str, gold: str, score: int, race: Path
) -> None:
    assert execution_match(predicted, gold, race) is bool(score)


def test_text_that_is_not_utf_8_is_compared_without_what_cannot_be_decoded(race: Path) -> None:
    gold = "SELECT CAST(x'41ff42' AS TEXT)"
    assert execution_match(gold, gold, race)
    assert execution_match("SELECT 'AB'", gold, race)


@pytest.mark.parametrize(
    "predicted",
    [
        "",
        "  \n",
        "-- nothing",
        "/* nothing",
        ";",
        f"{COUNT}; {COUNT}",
        f"{COUNT}; DROP TABLE runner",
        f"; {COUNT}",
        "DROP TABLE runner",
        "DELETE FROM runner",
        "INSERT INTO club VALUES (9, 'x', 1) RETURNING 5",
        "WITH a AS (SELECT 5) DELETE FROM runner RETURNING 5",
        "CREATE TABLE t AS SELECT 5",
        "ATTACH 'other.sqlite' AS other",
        "PRAGMA user_version = 5",
        "PRAGMA page_size",
        "SELECT count(*) FROM pragma_table_info('runner')",
        f"EXPLAIN {COUNT}",
        f"EXPLAIN QUERY PLAN {COUNT}",
        "VACUUM INTO 'other.sqlite'",
        "BEGIN",
        "SELECT load_extension('x')",
        "SELECT \x00 5",
        "SELECT '\ud800'",
        "SELECT ?",
        "(" * 50_000,
        "SELECT " + "(" * 2_000 + "5" + ")" * 2_000,
        "SELECT randomblob(1000000000)",
        "SELECT hex(zeroblob(400000000))",
        "WITH RECURSIVE c(x) AS (SELECT randomblob(9000000) UNION ALL SELECT randomblob(9000000) FROM c) "
        "SELECT x FROM c ORDER BY x",
    ],
)
def test_what_is_no_single_query_scores_0_and_changes_nothing(predicted: str, race: Path) -> None:
    before = hashlib.sha256(race.read_bytes()).hexdigest()
    assert execution_match(predicted, COUNT, race, timeout_s=10) is False
    assert hashlib.sha256(race.read_bytes()).hexdigest() == before
    assert [file.name for file in race.parent.iterdir()] == ["race.sqlite"]
    assert execution_match(COUNT, COUNT, race)


@pytest.mark.parametrize("query", [ENDLESS, CARTESIAN])
def test_an_endless_query_is_killed_and_scores_0(query: str, race: Path) -> None:
    began = time.monotonic()
    assert execution_match(query, COUNT, race, timeout_s=0.5) is False
    assert time.monotonic() - began < 20
    assert execution_match(COUNT, COUNT, race)


def test_more_rows_than_gold_has_are_not_waited_for(race: Path) -> None:
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c"
    began = time.monotonic()
    assert execution_match(endless, COUNT, race, timeout_s=60) is False
    assert time.monotonic() - began < 30


def test_an_awkward_permutation_of_many_columns_is_found_at_once(race: Path) -> None:
    columns = [f"{i % 3} AS a{i}" for i in range(40)]
    assert execution_match(f"SELECT {', '.join(columns[::-1])}", f"SELECT {', '.join(columns)}", race)


@pytest.mark.parametrize("gold", ["SELECT nme FROM runner", "", "DROP TABLE runner", ENDLESS])
def test_a_gold_that_does_not_run_is_an_error(gold: str, race: Path) -> None:
    with pytest.raises(InvalidInput, match="gold query"):
        execution_match(COUNT, gold, race, timeout_s=0.5)


def test_a_database_that_is_none_is_an_error(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with pytest.raises(InvalidInput, match="there is no database"):
        execution_match("SELECT 1", "SELECT 1", other)
    assert not other.exists()
    other.write_text("certainly no database, and longer than the header of one would be " * 20)
    with pytest.raises(InvalidInput, match="not a database"):
        execution_match("SELECT 1", "SELECT 1", other)
    with pytest.raises(InvalidInput, match="timeout_s"):
        execution_match("SELECT 1", "SELECT 1", other, timeout_s=0)


def test_what_stands_in_the_write_ahead_log_is_seen_and_left_there(tmp_path: Path) -> None:
    file = tmp_path / "live.sqlite"
    writer = sqlite3.connect(file)
    writer.executescript("PRAGMA journal_mode = WAL; CREATE TABLE t (x); INSERT INTO t VALUES (1), (2);")
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir() if each.suffix != ".sqlite-shm"}
    assert execution_match("SELECT 2", "SELECT count(*) FROM t", file)
    after = {each.name: each.read_bytes() for each in tmp_path.iterdir() if each.suffix != ".sqlite-shm"}
    assert after == before
    assert "live.sqlite-wal" in before
    writer.close()


def test_many_threads_and_an_event_loop_share_the_workers(race: Path) -> None:
    queries = [(COUNT, True), ("SELECT 4", False), ("SELECT", False), (ENDLESS, False)] * 6

    def score(query: str) -> bool:
        return execution_match(query, COUNT, race, timeout_s=1 if query is ENDLESS else 30)

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(score, [q for q, _ in queries])) == [right for _, right in queries]

    async def several() -> list[bool]:
        return await asyncio.gather(*(asyncio.to_thread(score, COUNT) for _ in range(8)))

    assert asyncio.run(several()) == [True] * 8

    async def inside() -> bool:
        return execution_match(COUNT, COUNT, race)

    assert asyncio.run(inside())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_workers_of_its_own(race: Path) -> None:
    program = (
        "import os\nfrom pathlib import Path\nfrom examples.spider_sql.reward import execution_match as m\n"
        f"file, query = Path({str(race)!r}), {COUNT!r}\n"
        "assert m(query, query, file)\n"
        "pid = os.fork()\n"
        "ok = all(m(query, query, file) for _ in range(3))\n"
        "if not pid: os._exit(0 if ok else 1)\n"
        "assert ok and os.waitpid(pid, 0)[1] == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_the_process_that_was_killed(race: Path) -> None:
    program = (
        "import os\nfrom pathlib import Path\nfrom examples.spider_sql import reward, sandbox\n"
        f"file = Path({str(race)!r})\n"
        f"reward.execution_match({COUNT!r}, {COUNT!r}, file)\n"
        "print(sandbox._pool._idle[0]._process.pid, flush=True)\n"
        f"reward.execution_match({ENDLESS!r}, {COUNT!r}, file, timeout_s=1)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 30
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_after_its_workers_were_ended_the_next_call_starts_one(race: Path) -> None:
    assert execution_match(COUNT, COUNT, race)
    sandbox.close_workers()
    assert execution_match(COUNT, COUNT, race)


def test_a_query_is_shown_with_its_first_rows_or_what_is_wrong_with_it(race: Path) -> None:
    assert sandbox.run("SELECT name, age FROM runner", race, limit=2) == "name | age\nAna | 31\nBo | 27"
    assert sandbox.run("SELECT name FROM runner WHERE 0", race) == "name\n(no rows)"
    assert sandbox.run("SELECT nme FROM runner", race) == "Error: no such column: nme"
    assert sandbox.run("DROP TABLE runner", race).startswith("Error: only a query that reads")
    assert sandbox.run(ENDLESS, race, timeout_s=0.5).startswith("Error: no result in 0.5 s")


def test_the_sample_needs_no_download_and_its_golds_run() -> None:
    questions = load("sample")
    assert len(questions.train) + len(questions.held_out) == len(QUESTIONS)
    for name, _, query in QUESTIONS:
        assert execution_match(query, query, database(name))


def test_one_database_never_stands_on_both_sides() -> None:
    tasks = [Task(str(i), {"question": str(i), "database": f"d{i % 10}"}) for i in range(100)]
    train, test = split_by_database(tasks, 20)
    sides = [
        {str(task.input["database"]) for task in side if isinstance(task.input, dict)}
        for side in (train, test)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert len(test) == 20


def test_lessons_teach_gold_and_call_mistakes_wrong() -> None:
    given = lessons(load("sample").train)
    answers = [lesson.answer for lesson in given]
    assert answers.count("yes") == answers.count("no") > 0
    for lesson in given:
        asked = lesson.messages[-1]["content"]
        if lesson.answer == "no":
            assert asked.split("Query: ")[1].split("\n")[0] not in [query for _, _, query in QUESTIONS]


def test_a_mistake_is_never_the_query_itself() -> None:
    schema = "runner(id, name, country, age)"
    for seed in range(50):
        for query in ("SELECT name FROM runner WHERE age > 28", COUNT, "SELECT name, age FROM runner"):
            assert mistaken(query, schema, random.Random(seed)) != query


def test_without_data_and_network_the_sample_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> tuple[list[dict[str, str]], str]:
        raise OSError("no route to host")

    monkeypatch.setattr("examples.spider_sql.data._rows", unreachable)
    questions = load("simple")
    assert "sample" in questions.source
    assert "no route to host" in questions.source
