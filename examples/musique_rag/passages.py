"""Passages, read one at a time from whatever holds them: a dump of Wikipedia does not fit into memory.

Read are JSON lines, JSON lists, and the tab-separated dump of 21 million passages that DPR published
(psgs_w100.tsv: id, text, title), each also compressed by gzip.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from agentlightning.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage of an encyclopedia."""

    title: str
    text: str


def read_passages(files: Iterable[Path]) -> Iterator[Passage]:
    """The passages of all files, in order."""
    for file in files:
        with _opened(file) as lines:
            suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
            match suffixes[-1:]:
                case [".json"]:
                    yield from (_passage(row, file) for row in json.load(lines))
                case [".tsv"]:
                    yield from _tsv(lines)
                case _:
                    yield from (_passage(json.loads(line), file) for line in lines if line.strip())


def _opened(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8")
    return file.open(encoding="utf-8")


def _tsv(lines: TextIO) -> Iterator[Passage]:
    for row in csv.reader(lines, delimiter="\t"):
        if row[0] != "id":
            yield Passage(row[2], row[1])


def _passage(row: dict[str, Any], file: Path) -> Passage:
    """From {"title", "text"}, or FlashRAG's {"contents": title, newline, text}."""
    if "contents" in row:
        title, _, text = row["contents"].partition("\n")
        return Passage(title.strip('"'), text)
    if "title" not in row or "text" not in row:
        raise InvalidInput(f"{file}: a passage needs a title and a text (or contents), got {sorted(row)}")
    return Passage(row["title"], row["text"])
