"""`agl export`: what was recorded, as files for other tools.

Rows go to standard output or a file, counts and remedies to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, TextIO

import typer

from agentlightning.doctor import Recorded
from agentlightning.errors import InvalidInput
from agentlightning.export import (
    ExportSettings,
    Report,
    recorded_from_spans,
    row_to_json,
    spans_from_file,
    transition_rows,
)
from agentlightning.types import Mode
from agentlightning_server.cli.option_groups import WORTH, Given, learning_of, option_group
from agentlightning_server.cli.sources import Source, stored

export = typer.Typer(no_args_is_help=True, help="Write what was recorded as files for other tools.")
GATEWAY: Final = (
    "send the agent's calls to the gateway (OPENAI_BASE_URL=URL/v1), its spans to the same server, and where "
    "no adapter of ours joins them name their rollout to both (README: OTEL_RESOURCE_ATTRIBUTES, "
    "OPENAI_CUSTOM_HEADERS)"
)


@export.callback()
def _export() -> None:
    """Keeps `transitions` a command of its own while there is only one."""


@export.command()
@option_group("learning", WORTH)
def transitions(
    run_folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run.")] = None,
    server: Annotated[str | None, typer.Option(help="URL of a live server instead.")] = None,
    key: Annotated[str | None, typer.Option(envvar="AGENTLIGHTNING_KEY")] = None,
    from_otlp: Annotated[
        Path | None,
        typer.Option(
            help="OTLP/JSON file instead (one request, or one a line; may be gzip). Needs no server."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; standard output otherwise.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Only rollouts of this mode.")] = None,
    all_calls: Annotated[
        bool | None,
        typer.Option(
            "--all-calls/--exact-only",
            help="Whether calls without exact token ids become rows, marked as such; "
            "by default only with --from-otlp.",
            show_default=False,
        ),
    ] = None,
    *,
    learning: Given,
) -> None:
    """One line of JSON per model call, in order: prompt, response and reward, with token ids where exact."""
    if sum(source is not None for source in (run_folder, server, from_otlp)) != 1:
        raise InvalidInput("name one source: the folder of a run, --server URL, or --from-otlp FILE")
    chosen = learning_of(learning)
    settings = ExportSettings(
        air=chosen.air,
        select=chosen.select,
        credit=chosen.credit,
        all_calls=from_otlp is not None if all_calls is None else all_calls,
    )
    report = Report()
    with _recorded(run_folder, server, key, from_otlp, mode) as recorded, _opened(output) as file:
        for row in transition_rows(recorded, settings, report):
            file.write(row_to_json(row) + "\n")
    for line in _summary(report):
        typer.echo(line, err=True)


@contextmanager
def _recorded(
    run_folder: Path | None, server: str | None, key: str | None, from_otlp: Path | None, mode: Mode | None
) -> Generator[Iterable[Recorded]]:
    if from_otlp is not None:
        found = recorded_from_spans(spans_from_file(from_otlp))
        yield [record for record in found if mode in (None, record.rollout.mode)]
        return
    with stored(run_folder, server, key) as source:
        yield _all(source, mode)


def _all(source: Source, mode: Mode | None) -> Iterator[Recorded]:
    for rollout in source.rollouts():
        if mode in (None, rollout.mode):
            yield Recorded(rollout, source.service.attempts(rollout.id), source.service.spans(rollout.id))


@contextmanager
def _opened(output: Path | None) -> Generator[TextIO]:
    if output is not None:
        with output.open("w", encoding="utf-8") as file:
            yield file
        return
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _summary(report: Report) -> Iterator[str]:
    yield f"{_calls(report.exact + report.inexact)} written, {report.exact} of them with exact token ids"
    if report.inexact:
        yield f'  {_calls(report.inexact)} have "exact": false and no token ids: what was sampled is unknown'
        yield f"  -> to train on such calls, {GATEWAY}"
    if report.left_out:
        yield f"  {_calls(report.left_out)} without exact token ids left out (--all-calls writes them)"
        yield f"  -> {GATEWAY}"
    if report.unselected:
        yield f"  {_calls(report.unselected)} of other agents left out"
    for sentence, count in report.problems.most_common():
        yield f"  {count} x {sentence}"


def _calls(count: int) -> str:
    return f"{count} call{'' if count == 1 else 's'}"
