"""`agl store`: the database itself: move it to the newest schema, check it, make it smaller, write it out.

Works on a SQLite file or a PostgreSQL database directly. Beside a server that runs on a SQLite file, leave
deleting to that server (`agl serve --retain-days`): it does not see what another process deletes.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from agentlightning import otlp
from agentlightning.errors import InvalidInput
from agentlightning_server.cli.options import say
from agentlightning_server.retention import Retention
from agentlightning_server.store import RolloutFilter, Store, is_url
from agentlightning_server.store.maintenance import problems, rewrite

store = typer.Typer(no_args_is_help=True, help="Look after the database of a server.")
MIB = 1 << 20

DatabaseArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATABASE",
        envvar="AGENTLIGHTNING_DATABASE",
        help="SQLite file, folder of a run, or postgresql:// URL.",
    ),
]


@contextmanager
def opened(database: str) -> Generator[Store]:
    """The database, which must exist. Raises InvalidInput."""
    if is_url(database):
        where: Path | str = database
    else:
        where = Path(database) / "store.db" if Path(database).is_dir() else Path(database)
        if not where.exists():
            raise InvalidInput(f"{where} does not exist: name the file, or the folder of a run")
    with Store(where) as found:
        yield found


@store.command()
def migrate(database: DatabaseArgument) -> None:
    """Move it to this version's schema, as a server does that opens it; an empty database gets its tables."""
    with opened(database) as found:
        say(f"{found.where} has this version's schema")


@store.command()
def check(database: DatabaseArgument) -> None:
    """Look for damage: broken pages, spans without a rollout, pieces that are missing. Exit code 1 if any."""
    with opened(database) as found:
        wrong = problems(found)
    for line in wrong:
        typer.echo(line)
    if wrong:
        raise typer.Exit(1)
    say("no problems found")


@store.command()
def vacuum(
    database: DatabaseArgument,
    older_than_days: Annotated[
        float | None, typer.Option(min=0, help="First delete rollouts that ended longer ago.")
    ] = None,
    larger_than_gib: Annotated[
        float | None, typer.Option(min=0, help="First delete the oldest while it is larger.")
    ] = None,
) -> None:
    """Delete what is old, if asked to, and give the room back to the disk."""
    rule = Retention(
        None if older_than_days is None else int(older_than_days * 86_400e9),
        None if larger_than_gib is None else int(larger_than_gib * (1 << 30)),
    )
    with opened(database) as found:
        deleted = found.delete_old(rule)
        before, after = rewrite(found)
        say(f"{deleted} rollouts deleted; {before / MIB:.1f} MiB before, {after / MIB:.1f} MiB after")


@store.command(name="export")
def export_spans(
    database: DatabaseArgument,
    output: Annotated[
        Path | None, typer.Option(help="File; gzip when it ends in .gz; standard output otherwise.")
    ] = None,
    project: Annotated[str, typer.Option(help="Project to write out.")] = "default",
) -> None:
    """Write all spans as OTLP/JSON, one attempt a line, for other tools and `agl export --from-otlp`."""
    count = 0
    with opened(database) as found, _file(output) as file:
        for line in _attempts(found.of(project)):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    say(f"{count} attempts written")


def _attempts(found: Store) -> Iterator[Any]:
    last: str | None = None
    while page := found.rollouts(RolloutFilter(after=last)):
        for rollout in page:
            for attempt in found.attempts(rollout.id):
                if spans := found.spans(rollout.id, attempt.id):
                    yield otlp.export_request(spans)
        last = page[-1].id


@contextmanager
def _file(output: Path | None) -> Generator[TextIO]:
    if output is None:
        yield sys.stdout
    elif output.suffix == ".gz":
        with gzip.open(output, "wt", encoding="utf-8") as file:
            yield file  # pyright: ignore[reportReturnType] - text mode gives text
    else:
        with output.open("w", encoding="utf-8") as file:
            yield file
