"""A request to a model as a span describes it, whatever API it goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentlightning.types import Message


@dataclass(frozen=True, slots=True)
class Request:
    """In the words of chat completions."""

    model: str | None
    messages: Sequence[Message]
    tools: Sequence[object]
    parameters: Mapping[str, Any]
    stream: bool


def merged(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the OpenAI SDK, with the fields that `extra_body` adds."""
    extra = arguments.get("extra_body")
    return {**arguments, **extra} if isinstance(extra, Mapping) else dict(arguments)


def items(value: Any) -> Sequence[Any]:
    """A list argument; none where the SDK leaves the argument out."""
    return value if isinstance(value, list) else ()  # pyright: ignore[reportUnknownVariableType]
