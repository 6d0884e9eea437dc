"""What a dialect is, and what all of them need: building records, errors, tools as OpenAI has them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, cast

from agentlightning import semconv
from agentlightning.reading import attributes as read
from agentlightning.types import (
    AgentRun,
    Json,
    JsonObject,
    LLMCall,
    Message,
    Span,
    SpanStatus,
    ToolCall,
    ToolStatus,
)

TOOL_CALLS: Final = "tool_calls"
STACK: Final = "Traceback (most recent call last):"
_FINISH_REASONS: Final = {"tool_call": TOOL_CALLS, "function_calls": TOOL_CALLS}
# pydantic names the model of the tool's arguments, so that a ValidationError inside the tool is no such one.
_BAD_ARGUMENTS: Final = (
    r"validation errors? for {name}|arguments validation failed|Invalid JSON input for tool"
)
_UNKNOWN_TOOL: Final = re.compile(r"Unknown tool name|not found in any workbench")
_uuid: Final = re.compile(r":[0-9a-f]{8}-[0-9a-f-]{27}$")


class Kind(Enum):
    """What a span is. OTHER: the dialect knows the span, and it is none of the rest."""

    LLM = auto()
    TOOL = auto()
    AGENT = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of instrumentations writes spans. `kind` is None for a span of another dialect."""

    name: str
    kind: Callable[[Span], Kind | None]
    llm: Callable[[Span], LLMCall]
    tool: Callable[[Span], ToolCall]
    agent: Callable[[Span], AgentRun]


def llm_call(
    span: Span,
    *,
    messages: Sequence[Message],
    output: Message | None,
    tools: Sequence[JsonObject] = (),
    agent_name: str | None = None,
    node_path: str | None = None,
    model: str | None = None,
    response_id: str | None = None,
    finish: str | None = None,
    temperature: float | None = None,
    input_tokens: int | None = None,
    output_tokens: int | None = None,
) -> LLMCall:
    """The record of a model call that somebody else traced; what was sampled is the gateway's to say."""
    return LLMCall(
        span_id=span.span_id,
        gateway_span_id=None,
        parent_id=span.parent_id,
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        messages=messages,
        output=output,
        tools=tools,
        agent_name=agent_name,
        node_path=node_path,
        model=model,
        response_id=response_id,
        finish_reason=finish_reason(finish),
        temperature=1.0 if temperature is None else temperature,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        error=error_of(span),
    )


def finish_reason(reason: str | None) -> str | None:
    """A finish reason in OpenAI's words; an empty one is none."""
    return _FINISH_REASONS.get(reason, reason) if reason else None


def tool_call(
    span: Span,
    *,
    name: str,
    arguments: Json,
    result: Json,
    call_id: str | None = None,
    agent_name: str | None = None,
    status: ToolStatus | None = None,
) -> ToolCall:
    """The record of a tool call; its status from the span's, unless the dialect knows better."""
    return ToolCall(
        span_id=span.span_id,
        parent_id=span.parent_id,
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        name=name,
        arguments=arguments,
        result=result,
        status=status or tool_status(span, name),
        error=error_of(span),
        call_id=call_id,
        agent_name=agent_name,
    )


def agent_run(span: Span, name: str | None) -> AgentRun:
    """The record of an agent's run; without a name it has the span's."""
    return AgentRun(
        span.span_id, span.parent_id, span.start_ns, span.end_ns, name or span.name, error_of(span)
    )


def error_of(span: Span) -> str | None:
    """Why a span failed, None when it did not. OpenInference adds the stack to the message."""
    if span.status is not SpanStatus.ERROR:
        return None
    said = span.status_message.partition(STACK)[0] or span.status_message or exception_message(span)
    return said or read.text(span.attributes, semconv.ERROR_TYPE) or "error"


def exception_message(span: Span) -> str | None:
    """The message of the exception that was recorded on a span."""
    messages = [read.text(e.attributes, "exception.message") for e in span.events if e.name == "exception"]
    return messages[-1] if messages else None


def tool_status(span: Span, name: str) -> ToolStatus:
    """How a tool call of a foreign span ended: frameworks only say why in the text of the error."""
    if span.status is not SpanStatus.ERROR:
        return ToolStatus.OK
    said = f"{span.status_message}\n{exception_message(span) or ''}"
    if re.search(_BAD_ARGUMENTS.format(name=re.escape(name)), said, re.IGNORECASE):
        return ToolStatus.BAD_ARGUMENTS
    return ToolStatus.UNKNOWN_TOOL if _UNKNOWN_TOOL.search(said) else ToolStatus.RAISED


def tool_definitions(value: Json) -> list[JsonObject]:
    """Tools in the shape of a chat-completions request, whether or not they are written flat."""
    return [_tool_definition(tool) for tool in items(value) if isinstance(tool, Mapping)]


def _tool_definition(tool: JsonObject) -> JsonObject:
    if "name" not in tool or "function" in tool:
        return tool
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": tool.get("type") or "function", "function": function}


def function_call(call_id: Json, name: Json, arguments: Json) -> dict[str, Json]:
    """One entry of a message's `tool_calls`."""
    function = {"name": name, "arguments": arguments if isinstance(arguments, str) else as_text(arguments)}
    return {"id": call_id, "type": "function", "function": function}


def node_path(checkpoint_namespace: str | None, node: str | None) -> str | None:
    """LangGraph's place of a call, without the ids of this very run: "writer/model"."""
    if not checkpoint_namespace:
        return node
    return "/".join(_uuid.sub("", part) for part in checkpoint_namespace.split("|"))


def items(value: Json) -> Sequence[Json]:
    """The value if it is a list, else nothing."""
    return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()


def fields(value: Json) -> JsonObject:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def string(value: Json) -> str | None:
    """The value if it is text that says something."""
    return value if isinstance(value, str) and value else None


def as_text(value: Json) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def parse(text: Json) -> Json:
    """A JSON text parsed; anything else, and what does not parse, as it is."""
    if not isinstance(text, str):
        return text
    try:
        return cast("Json", json.loads(text))
    except (ValueError, RecursionError):
        return text
