"""What LangChain's objects look like as JSON, as several instrumentations write them into attributes."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from agentlightning.reading.dialects import base
from agentlightning.reading.dialects.base import fields, items, string
from agentlightning.types import Json, JsonObject

_LONGEST_LITERAL = 65_536  # characters of a Python literal that are worth parsing


@dataclass(frozen=True, slots=True)
class ToolMessage:
    """A tool's answer."""

    content: Json
    call_id: str | None
    failed: bool


def tool_message(value: Json) -> ToolMessage | None:
    """Of {"lc": 1, "kwargs": {...}} or {"type": "tool", "data": {...}}; None for what is no ToolMessage."""
    inner = fields(fields(value).get("kwargs")) or fields(fields(value).get("data"))
    if inner.get("type") != "tool":
        return None
    return ToolMessage(
        inner.get("content"), string(inner.get("tool_call_id")), inner.get("status") == "error"
    )


def response_id(result: Json) -> str | None:
    """The response's id in a serialised LLMResult of one generation."""
    found = string(fields(fields(result).get("llm_output")).get("id"))
    for generations in items(fields(result).get("generations")):
        for generation in items(generations):
            message = fields(fields(fields(generation).get("message")).get("kwargs"))
            found = found or string(fields(message.get("response_metadata")).get("id"))
    return found


def python_literal(text: Json) -> Json:
    """The dict that a text like "{'a': 1}" stands for; the text itself where it stands for none."""
    if not isinstance(text, str) or not text.startswith("{") or len(text) > _LONGEST_LITERAL:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return base.parse(text)
    return cast("Json", value) if isinstance(value, dict) else text


@dataclass(frozen=True, slots=True)
class Place:
    """Who and where, from the metadata that LangGraph passes down to every run."""

    agent_name: str | None
    node_path: str | None


def place(metadata: JsonObject) -> Place:
    """The place that a run's metadata names."""
    namespace, node = (string(metadata.get(f"langgraph_{key}")) for key in ("checkpoint_ns", "node"))
    return Place(string(metadata.get("lc_agent_name")), base.node_path(namespace, node))


def metadata_of(value: Json) -> JsonObject:
    """The metadata among a callback's arguments."""
    found = fields(value).get("metadata")
    return found if isinstance(found, Mapping) else {}
