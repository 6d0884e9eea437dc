"""OpenTelemetry's GenAI conventions as they are now: the names of `semconv`, which our own spans use too.

Messages are JSON text or structured values. Writers differ in what the conventions leave open, and these
functions take it all: a system prompt apart from the messages, tools written flat, a tool's result that is no
text, or in a message of the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from agentlightning import semconv
from agentlightning.messages import from_parts
from agentlightning.reading import attributes as read
from agentlightning.reading.dialects import base
from agentlightning.reading.dialects.base import Dialect, Kind
from agentlightning.types import (
    AgentRun,
    Attributes,
    Json,
    JsonObject,
    LLMCall,
    Message,
    Span,
    ToolCall,
    ToolStatus,
)

SYSTEM_INSTRUCTIONS: Final = "gen_ai.system_instructions"
_DETAILS: Final = "gen_ai.client.inference.operation.details"
_STATUSES: Final = {str(status): status for status in ToolStatus}
KINDS: Final = {
    semconv.OP_CHAT: Kind.LLM,
    "generate_content": Kind.LLM,
    "text_completion": Kind.LLM,
    semconv.OP_TOOL: Kind.TOOL,
    semconv.OP_AGENT: Kind.AGENT,
}


def kind(span: Span) -> Kind | None:
    """By the operation's name. A tool call that waits for a person is none until it goes on."""
    found = KINDS.get(read.text(span.attributes, semconv.OPERATION) or "")
    if found is Kind.TOOL and semconv.TOOL_STATUS not in span.attributes:
        return Kind.OTHER if any(event.name == semconv.INTERRUPTED for event in span.events) else found
    return found


def llm(span: Span) -> LLMCall:
    """A model call; where the gateway wrote it, with what was sampled."""
    a = with_details(span)
    outputs = messages(a, semconv.OUTPUT_MESSAGES)
    is_gateway = span.scope == semconv.SCOPE_GATEWAY
    temperature = read.number(a, semconv.REQUEST_TEMPERATURE)
    return LLMCall(
        span_id=span.span_id,
        gateway_span_id=span.span_id if is_gateway else None,
        parent_id=span.parent_id,
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        messages=[*_instructions(a), *messages(a, semconv.INPUT_MESSAGES)],
        output=outputs[0] if outputs else None,
        tools=base.tool_definitions(read.parsed(a, semconv.TOOL_DEFINITIONS)),
        agent_name=read.text(a, semconv.AGENT_NAME),
        node_path=read.text(a, semconv.NODE_PATH),
        model=read.text(a, semconv.RESPONSE_MODEL, semconv.REQUEST_MODEL),
        response_id=read.text(a, semconv.RESPONSE_ID),
        finish_reason=_finish_reason(a),
        prompt_ids=read.token_ids(a, semconv.PROMPT_IDS),
        response_ids=read.token_ids(a, semconv.RESPONSE_IDS),
        logprobs=read.logprobs(a, semconv.RESPONSE_LOGPROBS),
        temperature=1.0 if temperature is None else temperature,
        policy=read.text(a, semconv.POLICY_NAME),
        policy_version=read.integer(a, semconv.POLICY_VERSION),
        input_tokens=read.integer(a, semconv.USAGE_INPUT, "gen_ai.usage.prompt_tokens"),
        output_tokens=read.integer(a, semconv.USAGE_OUTPUT, "gen_ai.usage.completion_tokens"),
        error=base.error_of(span),
        malformed_tool_call=read.text(a, semconv.MALFORMED_TOOL_CALL),
        response_schema=_schema(a),
    )


def _schema(attributes: Attributes) -> JsonObject | None:
    """The schema that was asked for; any object where only JSON was."""
    schema = read.parsed(attributes, semconv.RESPONSE_SCHEMA)
    if isinstance(schema, Mapping):
        return schema
    return {"type": "object"} if read.text(attributes, semconv.OUTPUT_TYPE) == "json" else None


def tool(span: Span) -> ToolCall:
    """A tool call; the status that our adapters state wins over the span's."""
    a = span.attributes
    return base.tool_call(
        span,
        name=read.text(a, semconv.TOOL_NAME) or span.name,
        arguments=read.parsed(a, semconv.TOOL_ARGUMENTS),
        result=read.parsed(a, semconv.TOOL_RESULT),
        call_id=read.text(a, semconv.TOOL_CALL_ID),
        agent_name=read.text(a, semconv.AGENT_NAME),
        status=_STATUSES.get(read.text(a, semconv.TOOL_STATUS) or ""),
    )


def agent(span: Span) -> AgentRun:
    """An agent's run."""
    return base.agent_run(span, read.text(span.attributes, semconv.AGENT_NAME))


GENAI: Final = Dialect("genai", kind, llm, tool, agent)


# --- messages ------------------------------------------------------------------------------------


def with_details(span: Span) -> Attributes:
    """The span's attributes, with those of the event that may carry its content in their stead."""
    details = [event.attributes for event in span.events if event.name == _DETAILS]
    return {**details[-1], **span.attributes} if details else span.attributes


def messages(attributes: Attributes, name: str) -> list[Message]:
    """Chat messages of an attribute, JSON text or structured; none when it is absent or unreadable."""
    return chat_messages(read.parsed(attributes, name))


def chat_messages(value: Json) -> list[Message]:
    """Chat messages from the conventions' messages, one or a list of them."""
    given = (value,) if isinstance(value, Mapping) else base.items(value)
    return [
        _as_chat(message)
        for item in given
        if isinstance(item, Mapping)
        for part in _apart(item)
        for message in from_parts(part)
    ]


def _apart(item: JsonObject) -> Iterable[JsonObject]:
    """A message that holds a tool's results beside other parts, as pydantic-ai's do, as one of each."""
    parts = [part for part in base.items(item.get("parts")) if isinstance(part, Mapping)]
    results = [part for part in parts if part.get("type") == "tool_call_response"]
    if not results or len(results) == len(parts):
        return (item,)
    others = [part for part in parts if part.get("type") != "tool_call_response"]
    return ({**item, "parts": results}, {**item, "parts": others})


def _as_chat(message: dict[str, Json]) -> Message:
    if "name" in message and message["name"] is None:
        del message["name"]
    if "tool_call_id" not in message:
        return message
    message["role"] = "tool"
    content = message.get("content")
    if content is not None and not isinstance(content, str) and not _is_content_parts(content):
        message["content"] = base.as_text(content)
    return message


def _is_content_parts(content: Json) -> bool:
    parts = base.items(content)
    return bool(parts) and all(isinstance(part, Mapping) and "type" in part for part in parts)


def _instructions(attributes: Attributes) -> list[Message]:
    """The system prompt that some writers keep apart from the messages."""
    parts = read.parsed(attributes, SYSTEM_INSTRUCTIONS)
    if isinstance(parts, str) and parts:
        return [{"role": "system", "content": parts}]
    texts = [base.string(base.fields(part).get("content")) for part in base.items(parts)]
    said = "\n\n".join(text for text in texts if text)
    return [{"role": "system", "content": said}] if said else []


def _finish_reason(attributes: Attributes) -> str | None:
    reason = read.first_text(attributes, semconv.RESPONSE_FINISH_REASONS)
    if reason is None:
        output = base.items(read.parsed(attributes, semconv.OUTPUT_MESSAGES))
        reason = base.string(base.fields(output[0]).get("finish_reason")) if output else None
    return base.finish_reason(reason)
