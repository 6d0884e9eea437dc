"""Functions of the user's by name: MODULE:FUNCTION or FILE.py:FUNCTION."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from agentlightning.errors import InvalidInput


def load_function(reference: str, what: str) -> Callable[..., Any]:
    """The function that a reference names; `what` it is for, as in "agent", stands in the errors.

    Raises InvalidInput when there is no such function; errors of the module itself pass through.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not name or not place:
        raise InvalidInput(f"{reference!r} names no {what}: write MODULE:FUNCTION or FILE.py:FUNCTION")
    found: Any = _import_file(Path(place)) if place.endswith(".py") else _import(place)
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidInput(f"{place} has no {name!r}: check the name of the {what} function")
        found = getattr(found, part)
    if not callable(found):
        raise InvalidInput(f"{reference} is a {type(found).__name__}, not a function")
    return found


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise InvalidInput(
            f"there is no module {error.name!r}: run in the folder that holds it, or install it"
        ) from error


def _import_file(path: Path) -> ModuleType:
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InvalidInput(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as python FILE.py does, for the modules beside it
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
