"""OpenAI's two APIs as they are on the wire, as chat messages: chat completions, and responses.

What this is not: a reader of the SDK's objects, except of a stream's events, which come in no other form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol, cast

from agentlightning.tracing.genai import LLMResponse
from agentlightning.tracing.guard import guarded
from agentlightning.types import Json, Message


class Parts(Protocol):
    """A streamed answer, put together."""

    def add(self, chunk: Any) -> None: ...
    def response(self) -> LLMResponse | None: ...


class Wire(Protocol):
    """One API."""

    def messages(self, body: Mapping[str, Any]) -> list[Message]:
        """What a request sends."""
        ...

    def response(self, body: Mapping[str, Any]) -> LLMResponse | None:
        """What was answered; None where the body holds no answer."""
        ...

    def parts(self) -> Parts: ...


# --- chat completions ----------------------------------------------------------------------------


class _Chat:
    def messages(self, body: Mapping[str, Any]) -> list[Message]:
        return list(body["messages"])

    def response(self, body: Mapping[str, Any]) -> LLMResponse | None:
        choices: list[Mapping[str, Any]] = body.get("choices") or []
        if not choices:
            return None
        usage: Mapping[str, Any] = body.get("usage") or {}
        return LLMResponse(
            message=_bare(choices[0]["message"]),
            finish_reason=choices[0].get("finish_reason"),
            id=body.get("id"),
            model=body.get("model"),
            input_tokens=usage.get("prompt_tokens"),
            output_tokens=usage.get("completion_tokens"),
            more=[_bare(choice["message"]) for choice in choices[1:]],
        )

    def parts(self) -> Parts:
        return _ChatParts()


def _bare(message: Mapping[str, Any]) -> Message:
    """The message without nulls for absent fields."""
    kept = {key: value for key, value in message.items() if value is not None}
    kept["content"] = message.get("content")
    return kept


class _ChatParts:
    def __init__(self) -> None:
        self._text: dict[str, list[str]] = {"content": [], "reasoning_content": [], "refusal": []}
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish_reason: str | None = None
        self._id: str | None = None
        self._model: str | None = None
        self._usage: Any = None

    @guarded
    def add(self, chunk: Any) -> None:
        self._id = self._id or chunk.id
        self._model = self._model or chunk.model
        self._usage = chunk.usage or self._usage
        if not chunk.choices or chunk.choices[0].index:
            return
        choice = chunk.choices[0]
        self._finish_reason = choice.finish_reason or self._finish_reason
        for name, texts in self._text.items():
            text = getattr(choice.delta, name, None)
            if text:
                texts.append(text)
        for call in choice.delta.tool_calls or ():
            self._add_call(call)

    def _add_call(self, delta: Any) -> None:
        call = self._calls.setdefault(
            delta.index or 0, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = call["id"] or delta.id
        if delta.function is not None:
            call["function"]["name"] += delta.function.name or ""
            call["function"]["arguments"] += delta.function.arguments or ""

    def response(self) -> LLMResponse | None:
        if self._id is None and self._finish_reason is None:
            return None
        message: dict[str, Json] = {"role": "assistant", "content": None}
        message.update({name: "".join(texts) for name, texts in self._text.items() if texts})
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        elif message["content"] is None:
            message["content"] = ""
        return LLMResponse(
            message=message,
            finish_reason=self._finish_reason,
            id=self._id,
            model=self._model,
            input_tokens=getattr(self._usage, "prompt_tokens", None),
            output_tokens=getattr(self._usage, "completion_tokens", None),
        )


# --- responses -----------------------------------------------------------------------------------


class _Responses:
    def messages(self, body: Mapping[str, Any]) -> list[Message]:
        messages: list[Message] = []
        if body.get("instructions"):
            messages.append({"role": "system", "content": body["instructions"]})
        given: str | Iterable[Mapping[str, Any]] = body.get("input") or ()
        if isinstance(given, str):
            return [*messages, {"role": "user", "content": given}]
        return [*messages, *_chat_messages(given)]

    def response(self, body: Mapping[str, Any]) -> LLMResponse | None:
        output: list[Mapping[str, Any]] | None = body.get("output")
        if output is None or body.get("error"):
            return None
        usage: Mapping[str, Any] = body.get("usage") or {}
        message = _merged(_chat_messages(output))
        return LLMResponse(
            message=message,
            finish_reason=_finish_reason(body, message),
            id=body.get("id"),
            model=body.get("model"),
            input_tokens=usage.get("input_tokens"),
            output_tokens=usage.get("output_tokens"),
        )

    def parts(self) -> Parts:
        return _ResponsesParts(self)


def _chat_messages(items: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Input or output items as chat messages; the calls that follow each other are one message's."""
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            )
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": _text(item.get("content"))})
    return cast("list[Message]", messages)


def _text(content: Any) -> Any:
    """Text parts as one text; content with anything else stays as it is."""
    if not isinstance(content, list):
        return content
    parts = cast("list[Any]", content)
    texts = [cast("Mapping[str, Any]", part).get("text") for part in parts if isinstance(part, Mapping)]
    if len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    return parts


def _merged(messages: list[Message]) -> Message:
    """The one message that an answer's items make."""
    merged: dict[str, Json] = {"role": "assistant", "content": None}
    for message in messages:
        merged.update({key: value for key, value in message.items() if value is not None})
    return merged


def _finish_reason(body: Mapping[str, Any], message: Message) -> str | None:
    if body.get("status") == "incomplete":
        details: Mapping[str, Any] = body.get("incomplete_details") or {}
        reason: str | None = details.get("reason")
        return "length" if reason == "max_output_tokens" else reason
    return "tool_calls" if "tool_calls" in message else "stop"


class _ResponsesParts:
    """The last event of a stream holds the whole answer."""

    def __init__(self, wire: _Responses) -> None:
        self._wire = wire
        self._last: Any = None

    def add(self, chunk: Any) -> None:
        self._last = chunk

    def response(self) -> LLMResponse | None:
        whole = getattr(self._last, "response", None)
        if whole is None:
            return None
        return self._wire.response(whole.model_dump(mode="json", exclude_unset=True))


CHAT: Final[Wire] = _Chat()
RESPONSES: Final[Wire] = _Responses()
