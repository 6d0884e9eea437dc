"""The server's log: lines for people, or one JSON object a line.

Nothing here ever gets a body, a query or a header. Invariant: what looks like a key of ours is masked, in
messages of other libraries and in tracebacks too.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Final

from ..settings import LogFormat

LOGGER = "agentlightning_server"
FIELDS = "agentlightning_fields"  # attribute of a record that holds a line's own fields
_KEY: Final = re.compile(r"agl-([a-z]+)-[A-Za-z0-9_-]{16,}")


def configure_logs(log_format: LogFormat, level: str) -> None:
    """Send the log to standard error in this form. Call it in a process that serves, not in a library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(LOGGER).setLevel(level.upper())


def masked(text: str) -> str:
    """The text without keys; their scope stays."""
    return _KEY.sub(r"agl-\1-[masked]", text)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, FIELDS, {})
        own = "".join(f" {name}={value}" for name, value in fields.items())
        return masked(super().format(record) + own)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return masked(json.dumps(line, default=str))
