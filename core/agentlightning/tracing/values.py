"""Attribute values that every way of travelling can carry.

OpenTelemetry's SDK refuses what protobuf cannot hold (a lone surrogate in a text loses the whole batch of
spans), so both tracers clean values here first and therefore write the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, cast

import orjson

from agentlightning.types import Attributes, AttributeValue

_SCALARS: Final = (str, bool, int, float)
_INT64_MAX: Final = 2**63 - 1


def clean_attributes(attributes: Attributes) -> dict[str, AttributeValue]:
    """The attributes without None values, each value a text, bool, 64-bit int, float, bytes or flat list.

    Anything else becomes JSON text.
    """
    return {
        key if key.isascii() else clean_text(key): _clean(value)
        for key, value in attributes.items()
        if value is not None
    }


def _clean(value: AttributeValue) -> AttributeValue:
    if isinstance(value, str):
        return value if value.isascii() else clean_text(value)
    if value is None or isinstance(value, (bool, float, bytes)):
        return value
    if isinstance(value, int):
        return value if -_INT64_MAX <= value <= _INT64_MAX else str(value)
    return _clean_sequence(value) if isinstance(value, list | tuple) else to_json(value)


def _clean_sequence(values: Sequence[AttributeValue]) -> AttributeValue:
    for kind in _SCALARS:
        if all(type(value) is kind for value in values):
            return [_clean(value) for value in values]
    return to_json(values)


def clean_text(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def to_json(value: object) -> str:
    """JSON text of anything: pydantic models and dataclass-like objects by their fields, the rest by `str`.

    Never raises: what cannot be written at all gives its type's name in angle brackets.
    """
    try:
        return orjson.dumps(value, _plain, _OPTIONS).decode()
    except Exception:  # what orjson does not write: lone surrogates, integers beyond 64 bits
        return _slowly(value)


def _slowly(value: object) -> str:
    try:
        return _encode(value)
    except Exception:  # of the value's own code, too
        return json.dumps(f"<{type(value).__name__}>")


def _plain(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    if callable(dump) and not isinstance(value, type):
        try:
            return dump(mode="json")
        except Exception:
            return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(cast("frozenset[object]", value), key=str)
    if isinstance(value, type):
        return value.__qualname__
    return str(value)


_OPTIONS: Final = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain).encode
