"""Keeps telemetry from harming the agent: what goes wrong in a hook is logged and counted, never raised.

Each failing place is logged once with its traceback and then only counted, so that a hook which fails on
every call does not bury the agent's own log.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

logger: Final = logging.getLogger("agentlightning")
failures: Final[Counter[str]] = Counter()
"""How often each guarded place failed in this process, by qualified name."""

P = ParamSpec("P")
R = TypeVar("R")


def guarded(function: Callable[P, R]) -> Callable[P, R | None]:
    """The function, returning None where it would have raised an Exception."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            record_failure(f"{function.__module__}.{function.__qualname__}", error)
            return None

    return call


def text_of_error(error: BaseException) -> str:
    """What an exception says, its type's name where it says nothing or cannot be asked."""
    try:
        return str(error) or type(error).__qualname__
    except Exception:
        return type(error).__qualname__


def record_failure(place: str, error: BaseException) -> None:
    """Count a failure of telemetry; log the first one of its place."""
    failures[place] += 1
    if failures[place] == 1:
        logger.warning(
            "[non-fatal] %s failed: %s: %s. The agent is unaffected; what this hook records is incomplete.",
            place,
            type(error).__name__,
            text_of_error(error),
            exc_info=error,
        )


def warn(message: str, *args: object) -> None:
    """A warning about telemetry that the agent survives."""
    logger.warning("[non-fatal] " + message, *args)
