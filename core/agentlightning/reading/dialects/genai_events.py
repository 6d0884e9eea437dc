"""The GenAI conventions up to version 1.36: one event per message, named after its role.

Events are the span's own, as several SDKs write them, or a JSON list in the attribute `events`, which is how
pydantic-ai writes its version 1. Other attributes are those of `genai`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, cast

from agentlightning import semconv
from agentlightning.reading import attributes as read
from agentlightning.reading.dialects import base, genai
from agentlightning.reading.dialects.base import Dialect, Kind
from agentlightning.types import Attributes, Json, JsonObject, LLMCall, Message, Span

EVENTS: Final = "events"
_CHOICE: Final = "gen_ai.choice"
_ROLES: Final = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
}
_BLOBS: Final = {"gen_ai.content.prompt": "gen_ai.prompt", "gen_ai.content.completion": "gen_ai.completion"}


def kind(span: Span) -> Kind | None:
    """A model call whose messages are events; everything else is read as `genai` does."""
    found = genai.kind(span)
    if found is not Kind.LLM or semconv.INPUT_MESSAGES in span.attributes:
        return None
    return Kind.LLM if any(True for _ in events(span)) else None


def llm(span: Span) -> LLMCall:
    """A model call."""
    asked: list[Message] = []
    answers: list[tuple[Message, str | None]] = []
    for name, body in events(span):
        if name == _CHOICE:
            answers.append(_choice(body))
        elif name in _ROLES:
            asked.append(_message(body, _ROLES[name]))
        else:
            _add_blob(name, body, asked, answers)
    call = genai.llm(span)
    output, finish = answers[0] if answers else (None, None)
    return replace(
        call, messages=asked, output=output, finish_reason=call.finish_reason or base.finish_reason(finish)
    )


GENAI_EVENTS: Final = Dialect("genai_events", kind, llm, genai.tool, genai.agent)


def events(span: Span) -> Iterator[tuple[str, JsonObject]]:
    """Name and body of each message event."""
    for item in base.items(read.parsed(span.attributes, EVENTS)):
        body = base.fields(item)
        name = body.get("event.name")
        if isinstance(name, str) and (name in _ROLES or name == _CHOICE):
            yield name, body
    for event in span.events:
        if event.name in _ROLES or event.name == _CHOICE or event.name in _BLOBS:
            yield event.name, _body(event.attributes)


def _body(attributes: Attributes) -> JsonObject:
    """An event's body: its attributes, some of them JSON text, or one attribute that holds them all."""
    whole = base.parse(read.text(attributes, "gen_ai.event.content"))
    if isinstance(whole, dict):
        return whole
    body = {name: value for name, value in attributes.items() if not isinstance(value, bytes)}
    return {
        **cast("JsonObject", body),
        **{n: read.parsed(attributes, n) for n in ("message", "tool_calls") if n in body},
    }


def _message(body: JsonObject, role: str) -> Message:
    message: dict[str, Json] = {"role": role, "content": body.get("content")}
    calls = base.items(body.get("tool_calls"))
    if calls:
        message["tool_calls"] = [_call(base.fields(call)) for call in calls]
    if role == "tool":
        message["tool_call_id"] = body.get("id")
        message["content"] = base.as_text(body.get("content"))
    return message


def _call(call: JsonObject) -> Json:
    function = base.fields(call.get("function"))
    return base.function_call(call.get("id"), function.get("name"), function.get("arguments"))


def _choice(body: JsonObject) -> tuple[Message, str | None]:
    message = base.fields(body.get("message")) or body
    return _message(message, "assistant"), base.string(body.get("finish_reason"))


def _add_blob(
    name: str, body: JsonObject, asked: list[Message], answers: list[tuple[Message, str | None]]
) -> None:
    """The oldest form: all messages of one side as JSON text."""
    found = genai.chat_messages(base.parse(body.get(_BLOBS[name])))
    if name == "gen_ai.content.prompt":
        asked.extend(found)
    else:
        answers.extend((message, None) for message in found)
