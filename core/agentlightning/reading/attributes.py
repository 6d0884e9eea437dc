"""Typed access to span attributes of any writer: a wrong type reads as absent, never raises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from agentlightning.types import Attributes, Json

if TYPE_CHECKING:
    from agentlightning.types import Logprobs, TokenIds


def text(attributes: Attributes, *names: str) -> str | None:
    """The first of `names` that holds a string, else None."""
    for name in names:
        value = attributes.get(name)
        if isinstance(value, str):
            return value
    return None


def integer(attributes: Attributes, *names: str) -> int | None:
    """The first of `names` that holds an integer, else None."""
    for name in names:
        value = attributes.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def number(attributes: Attributes, name: str) -> float | None:
    """A number, else None."""
    value = attributes.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None


def parsed(attributes: Attributes, name: str) -> Json:
    """A JSON string parsed, or the value as it is where it is no JSON string."""
    value = attributes.get(name)
    if isinstance(value, str):
        try:
            return cast(Json, json.loads(value))
        except (ValueError, RecursionError):
            return value
    return None if isinstance(value, bytes) else cast(Json, value)


def first_text(attributes: Attributes, name: str) -> str | None:
    """The first string of an array of strings, or the string itself."""
    value = attributes.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[0], str):
        return value[0]
    return None


def token_ids(attributes: Attributes, name: str) -> TokenIds | None:
    """Token ids [n], little-endian int32 bytes on the wire; None when absent or cut off."""
    value = attributes.get(name)
    if not isinstance(value, bytes) or len(value) % 4:
        return None
    return np.frombuffer(value, dtype="<i4").astype(np.int32, copy=False)


def logprobs(attributes: Attributes, name: str) -> Logprobs | None:
    """Log-probabilities [n], little-endian float32 bytes on the wire; None when absent or cut off."""
    value = attributes.get(name)
    if not isinstance(value, bytes) or len(value) % 4:
        return None
    return np.frombuffer(value, dtype="<f4").astype(np.float32, copy=False)


def pack_token_ids(ids: Sequence[int]) -> bytes:
    """Inverse of `token_ids`."""
    return np.asarray(ids, dtype="<i4").tobytes()


def pack_logprobs(values: Sequence[float]) -> bytes:
    """Inverse of `logprobs`."""
    return np.asarray(values, dtype="<f4").tobytes()
