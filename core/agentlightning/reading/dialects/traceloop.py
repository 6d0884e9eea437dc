"""Traceloop's OpenLLMetry: `traceloop.span.kind` and `traceloop.entity.*`, around GenAI attributes.

Up to 2025 a model call has `gen_ai.prompt.0.role`, `gen_ai.completion.0.content` and
`llm.request.functions.0.name`; since then the attributes of `genai`. For LangChain, who and where is in
`traceloop.association.properties.*`, and a tool's arguments are all that the callback was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from agentlightning import semconv
from agentlightning.reading import attributes as read
from agentlightning.reading.dialects import base, genai, langchain
from agentlightning.reading.dialects.base import Dialect, Kind, fields
from agentlightning.reading.dialects.flattened import Tree, below, entries, leaf, tree
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

_SPAN_KIND: Final = "traceloop.span.kind"
_ENTITY: Final = "traceloop.entity.name"
_REQUEST: Final = "llm.request.type"
_KINDS: Final = {"tool": Kind.TOOL, "agent": Kind.AGENT, "workflow": Kind.AGENT}
_SCOPES: Final = ("opentelemetry.instrumentation.langchain", "opentelemetry.instrumentation.crewai")


def kind(span: Span) -> Kind | None:
    """By the span kind; model calls have none."""
    a = span.attributes
    stated = read.text(a, _SPAN_KIND)
    if stated is not None:
        return _KINDS.get(stated, Kind.OTHER)
    if read.text(a, _REQUEST) in ("chat", "completion") or "gen_ai.prompt.0.role" in a:
        return Kind.LLM
    if not span.scope.startswith(_SCOPES) and not any(name.startswith("traceloop.") for name in a):
        return None
    found = genai.kind(span) or Kind.OTHER
    unnamed = found is Kind.AGENT and semconv.AGENT_NAME not in a  # a crew's or a task's span
    return Kind.OTHER if unnamed else found


def llm(span: Span) -> LLMCall:
    """A model call."""
    a = span.attributes
    call = genai.llm(span)
    where = _place(a)
    path = where.node_path or base.string((read.text(a, "traceloop.entity.path") or "").replace(".", "/"))
    call = replace(call, agent_name=call.agent_name or where.agent_name, node_path=path)
    if semconv.INPUT_MESSAGES in a:
        return call
    answers = entries(tree(a, "gen_ai.completion"))
    finish = leaf(answers[0], "finish_reason") if answers else None
    return replace(
        call,
        messages=[_message(entry) for entry in entries(tree(a, "gen_ai.prompt"))],
        output=_message({"role": "assistant", **answers[0]}) if answers else None,
        tools=call.tools or _functions(a),
        finish_reason=call.finish_reason or base.finish_reason(base.string(finish)),
    )


def tool(span: Span) -> ToolCall:
    """A tool call."""
    a = span.attributes
    given = _first(a, semconv.TOOL_ARGUMENTS, "traceloop.entity.input")
    result = _first(a, semconv.TOOL_RESULT, "traceloop.entity.output")
    answer = langchain.tool_message(fields(result).get("output"))
    failed = answer is not None and answer.failed
    return base.tool_call(
        span,
        name=read.text(a, semconv.TOOL_NAME, _ENTITY) or span.name,
        arguments=_arguments(given),
        result=answer.content if answer is not None else result,
        call_id=read.text(a, semconv.TOOL_CALL_ID) or (answer.call_id if answer is not None else None),
        agent_name=read.text(a, semconv.AGENT_NAME) or _place(a).agent_name or _place_in(given).agent_name,
        status=ToolStatus.RAISED if failed else None,
    )


def agent(span: Span) -> AgentRun:
    """An agent's run, or a workflow's."""
    a = span.attributes
    return base.agent_run(span, read.text(a, semconv.AGENT_NAME, _ENTITY, "traceloop.workflow.name"))


TRACELOOP: Final = Dialect("traceloop", kind, llm, tool, agent)


def _first(attributes: Attributes, *names: str) -> Json:
    return next((read.parsed(attributes, name) for name in names if name in attributes), None)


def _place(attributes: Attributes) -> langchain.Place:
    properties = "traceloop.association.properties."
    named = {key.removeprefix(properties): v for key, v in attributes.items() if key.startswith(properties)}
    return langchain.place({key: value for key, value in named.items() if isinstance(value, str)})


def _place_in(callback: Json) -> langchain.Place:
    return langchain.place(langchain.metadata_of(callback))


def _arguments(given: Json) -> Json:
    """A tool's arguments among those of LangChain's callback, or as they are."""
    callback = fields(given)
    if "input_str" not in callback:
        return given
    inputs = callback.get("inputs")
    return inputs if isinstance(inputs, Mapping) else langchain.python_literal(callback.get("input_str"))


def _message(entry: Tree) -> Message:
    message: dict[str, Json] = {"role": leaf(entry, "role"), "content": _content(leaf(entry, "content"))}
    calls = entries(below(entry, "tool_calls"))
    if calls:
        message["tool_calls"] = [
            base.function_call(leaf(call, "id"), leaf(call, "name"), leaf(call, "arguments"))
            for call in calls
        ]
    call_id = leaf(entry, "tool_call_id")
    if call_id is not None:
        message["tool_call_id"] = call_id
    return message


def _content(content: Json) -> Json:
    """Content parts are written as JSON text, and so is LangChain's empty answer."""
    if content == '""':
        return ""
    parsed = base.parse(content)
    is_parts = bool(base.items(parsed)) and all("type" in fields(part) for part in base.items(parsed))
    return parsed if is_parts else content


def _functions(attributes: Attributes) -> list[JsonObject]:
    listed = entries(tree(attributes, "llm.request.functions"))
    return base.tool_definitions(
        [
            {
                "name": leaf(entry, "name"),
                "description": leaf(entry, "description"),
                "parameters": base.parse(leaf(entry, "parameters")),
            }
            for entry in listed
        ]
    )
