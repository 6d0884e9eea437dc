"""The attributes of our three kinds of span (model call, tool call, agent run), built in one place.

All adapters write through these functions, so that a span looks the same whatever framework it came from. The
names are those of `semconv`; messages are OpenAI chat messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agentlightning import semconv
from agentlightning.context import SpanRef
from agentlightning.messages import messages_to_json, output_to_json
from agentlightning.tracing.base import SpanHandle, Tracer
from agentlightning.tracing.guard import text_of_error
from agentlightning.tracing.values import to_json
from agentlightning.types import AttributeValue, Message, SpanKind, SpanStatus, ToolStatus

_PARAMETERS: Final = {
    "temperature": semconv.REQUEST_TEMPERATURE,
    "top_p": semconv.REQUEST_TOP_P,
    "max_tokens": semconv.REQUEST_MAX_TOKENS,
    "max_completion_tokens": semconv.REQUEST_MAX_TOKENS,
    "seed": semconv.REQUEST_SEED,
    "n": semconv.REQUEST_CHOICES,
}


@dataclass(frozen=True, slots=True)
class Where:
    """Who asks: the agent's name, its place in a graph, and the adapter's scope."""

    scope: str
    agent_name: str | None = None
    node_path: str | None = None

    def attributes(self) -> dict[str, AttributeValue]:
        return {semconv.AGENT_NAME: self.agent_name, semconv.NODE_PATH: self.node_path}


@dataclass(frozen=True, slots=True)
class LLMResponse:
    """What a model answered, as far as the framework passes it on."""

    message: Message
    finish_reason: str | None = None
    id: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    more: Sequence[Message] = ()
    """The other choices, where several were asked for."""


def start_llm(
    tracer: Tracer,
    where: Where,
    parent: SpanRef | None,
    *,
    model: str | None,
    messages: Iterable[Message],
    tools: Sequence[object] = (),
    parameters: Mapping[str, object] | None = None,
    stream: bool = False,
    provider: str = "openai",
    start_ns: int | None = None,
) -> SpanHandle:
    """Start the span of one model call. `parameters` are those of a chat-completions request."""
    attributes: dict[str, AttributeValue] = {
        semconv.OPERATION: semconv.OP_CHAT,
        semconv.PROVIDER: provider,
        semconv.REQUEST_MODEL: model,
        semconv.INPUT_MESSAGES: messages_to_json(messages),
        semconv.TOOL_DEFINITIONS: to_json(tools) if tools else None,
        semconv.REQUEST_STREAM: True if stream else None,
    }
    attributes.update(where.attributes())
    attributes.update(_parameters(parameters or {}))
    span = tracer.start_span(
        f"chat {model}" if model else "chat",
        kind=SpanKind.CLIENT,
        parent=parent,
        attributes=attributes,
        start_ns=start_ns,
        scope=where.scope,
    )
    span.ref.agent_name = where.agent_name
    return span


def _parameters(parameters: Mapping[str, object]) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {}
    for name, attribute in _PARAMETERS.items():
        value = parameters.get(name)
        if isinstance(value, (int, float)):
            found[attribute] = value
    stop = parameters.get("stop")
    if isinstance(stop, str):
        found[semconv.REQUEST_STOP] = [stop]
    elif isinstance(stop, (list, tuple)):
        found[semconv.REQUEST_STOP] = [str(text) for text in stop]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return found


def end_llm(span: SpanHandle, response: LLMResponse) -> None:
    """End the span of a model call that was answered."""
    span.set(
        {
            semconv.OUTPUT_MESSAGES: output_to_json(response.message, response.finish_reason, response.more),
            semconv.RESPONSE_FINISH_REASONS: [response.finish_reason] if response.finish_reason else None,
            semconv.RESPONSE_ID: response.id,
            semconv.RESPONSE_MODEL: response.model,
            semconv.USAGE_INPUT: response.input_tokens,
            semconv.USAGE_OUTPUT: response.output_tokens,
        }
    )
    span.end()


def start_tool(
    tracer: Tracer,
    where: Where,
    parent: SpanRef | None,
    *,
    name: str,
    arguments: object,
    call_id: str | None = None,
    description: str | None = None,
    start_ns: int | None = None,
) -> SpanHandle:
    """Start the span of one tool call. `arguments` are the text that the model wrote, or parsed ones."""
    attributes: dict[str, AttributeValue] = {
        semconv.OPERATION: semconv.OP_TOOL,
        semconv.TOOL_NAME: name,
        semconv.TOOL_CALL_ID: call_id,
        semconv.TOOL_DESCRIPTION: description,
        semconv.TOOL_ARGUMENTS: text_or_json(arguments),
    }
    attributes.update(where.attributes())
    span = tracer.start_span(
        f"execute_tool {name}",
        parent=parent,
        attributes=attributes,
        start_ns=start_ns,
        scope=where.scope,
    )
    span.ref.agent_name = where.agent_name
    return span


def end_tool(
    span: SpanHandle,
    status: ToolStatus,
    *,
    result: object = None,
    error: BaseException | str | None = None,
    end_ns: int | None = None,
) -> None:
    """End the span of a tool call; anything but `ToolStatus.OK` is an error of the span."""
    attributes: dict[str, AttributeValue] = {
        semconv.TOOL_STATUS: str(status),
        semconv.TOOL_RESULT: None if result is None else text_or_json(result),
    }
    if status is ToolStatus.OK:
        span.set(attributes)
        span.end(end_ns=end_ns)
        return
    attributes[semconv.ERROR_TYPE] = (
        type(error).__qualname__ if isinstance(error, BaseException) else str(status)
    )
    span.set(attributes)
    span.end(SpanStatus.ERROR, _message(error, status), end_ns)


def _message(error: BaseException | str | None, status: ToolStatus) -> str:
    if isinstance(error, BaseException):
        return text_of_error(error)
    return error or str(status)


def start_agent(
    tracer: Tracer, where: Where, parent: SpanRef | None, *, name: str, start_ns: int | None = None
) -> SpanHandle:
    """Start the span of one run of a named agent, graph or team."""
    attributes: dict[str, AttributeValue] = {semconv.OPERATION: semconv.OP_AGENT}
    attributes.update(where.attributes())
    attributes[semconv.AGENT_NAME] = name
    span = tracer.start_span(
        f"invoke_agent {name}", parent=parent, attributes=attributes, start_ns=start_ns, scope=where.scope
    )
    span.ref.agent_name = name
    span.ref.is_agent_run = True
    return span


def text_or_json(value: object) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else to_json(value)
