"""How much a test does: little in `make test`, the whole promise in `make soak` and `make fuzz`."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T", int, float)

LONG = os.environ.get("AGENTLIGHTNING_LONG_TESTS") == "1"


def scaled(short: T, long: T) -> T:
    """`long` in `make soak` and `make fuzz`."""
    return long if LONG else short
