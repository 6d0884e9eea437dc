"""Wrapping functions of libraries that offer no hook, so that it can be taken back.

What this is not: a reason to patch where a callback exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from agentlightning.tracing.guard import warn


class Patches:
    """The functions wrapped so far; true while there are any."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._done)

    def wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace `owner.name` by `make(original)`. Static methods stay static.

        A name that this version of the library does not have is left out with a warning.
        """
        try:
            found = inspect.getattr_static(owner, name)
        except AttributeError:
            warn("%s.%s is gone in this version of the library; it is not recorded.", owner.__name__, name)
            return
        static = isinstance(found, staticmethod)
        ours: Any = make(found.__func__ if static else found)
        ours = staticmethod(ours) if static else ours
        setattr(owner, name, ours)
        self._done.append((owner, name, found, ours))

    def undo(self) -> None:
        """Put the originals back, except under what somebody else has wrapped since."""
        while self._done:
            owner, name, original, ours = self._done.pop()
            if inspect.getattr_static(owner, name) is ours:
                setattr(owner, name, original)
