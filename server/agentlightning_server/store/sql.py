"""What SQLite and PostgreSQL say differently, and statements that go straight to the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from .changes import Changes

_MAX_VARIABLES = 500  # per statement, far below either database's limit


@dataclass(frozen=True, slots=True)
class Write:
    """What one write runs with: inside the writer's transaction, on behalf of a project."""

    connection: sa.Connection
    changes: Changes
    project: str
    now_ns: int

    def execute(self, statement: sa.Executable, **values: Any) -> sa.CursorResult[Any]:
        """Run a statement that has a parameter `the_project`."""
        return self.connection.execute(statement, {"the_project": self.project, **values})


@dataclass(frozen=True, slots=True)
class Read:
    """What one read runs with."""

    connection: sa.Connection
    project: str

    def execute(self, statement: sa.Executable, **values: Any) -> sa.CursorResult[Any]:
        """Run a statement that has a parameter `the_project`."""
        return self.connection.execute(statement, {"the_project": self.project, **values})


class InsertNew(sa.Insert):
    """An INSERT that leaves rows whose key exists as they are."""

    inherit_cache = True

    def __init__(self, table: sa.Table) -> None:
        super().__init__(table)
        self._inline = True  # no RETURNING, whose place is after what is added here


@compiles(InsertNew)
def _insert_new(statement: InsertNew, compiler: SQLCompiler, **options: Any) -> str:
    plain = cast(str, compiler.visit_insert(statement, **options))  # pyright: ignore[reportUnknownMemberType]
    return f"{plain} ON CONFLICT DO NOTHING"


class FastInsert:
    """Many rows straight to the driver: SQLAlchemy's own work costs more than the database's."""

    def __init__(self, table: sa.Table, columns: Sequence[str]) -> None:
        self._statement = InsertNew(table).values({name: sa.bindparam(name) for name in columns})
        self._compiled: dict[str, tuple[str, Any]] = {}

    def __call__(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows of driver values; those that exist stay as they are."""
        if not rows:
            return
        sql, pick = self._of(connection)
        cursor = connection.connection.cursor()
        try:
            cursor.executemany(sql, rows if pick is None else map(pick, rows))  # type: ignore[arg-type]
        except connection.dialect.loaded_dbapi.Error as error:
            raise DBAPIError(sql, None, error) from error
        finally:
            cursor.close()

    def _of(self, connection: sa.Connection) -> tuple[str, Any]:
        name = connection.dialect.name
        if name not in self._compiled:
            compiled = self._statement.compile(dialect=connection.dialect)
            names = compiled.positiontup  # type: ignore[attr-defined]
            self._compiled[name] = str(compiled), itemgetter(*names) if names else None
        return self._compiled[name]


def chunked(ids: Iterable[str]) -> Iterable[Sequence[str]]:
    """Parts that fit into one statement."""
    known = list(ids)
    return (known[i : i + _MAX_VARIABLES] for i in range(0, len(known), _MAX_VARIABLES))
