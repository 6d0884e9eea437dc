"""OpenInference (Arize): `openinference.span.kind`, messages and tools flattened into attribute names.

Its convention has no place for a response's id, a tool call's id or an agent's place in a graph; they are
taken from where its instrumentations leave them: the raw output, LangChain's metadata, `graph.node.id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from agentlightning.reading import attributes as read
from agentlightning.reading.dialects import base, langchain
from agentlightning.reading.dialects.base import Dialect, Kind, as_text, fields, items, string
from agentlightning.reading.dialects.flattened import Tree, below, entries, leaf, tree, values
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

SPAN_KIND: Final = "openinference.span.kind"
_KINDS: Final = {"LLM": Kind.LLM, "TOOL": Kind.TOOL, "AGENT": Kind.AGENT}


def kind(span: Span) -> Kind | None:
    """By the span kind; a chain that is a LangChain agent is one."""
    stated = read.text(span.attributes, SPAN_KIND)
    if stated is None:
        return None
    if stated == "CHAIN" and _metadata(span.attributes).get("lc_agent_name") == span.name:
        return Kind.AGENT
    return _KINDS.get(stated, Kind.OTHER)


def llm(span: Span) -> LLMCall:
    """A model call."""
    a = span.attributes
    raw = read.parsed(a, "output.value")
    outputs = _messages(a, "llm.output_messages")
    parameters = fields(read.parsed(a, "llm.invocation_parameters"))
    where = langchain.place(_metadata(a))
    finish = read.text(a, "llm.finish_reason") or string(fields(raw).get("finish_reason"))
    return base.llm_call(
        span,
        messages=_messages(a, "llm.input_messages"),
        output=outputs[0] if outputs else _raw_tool_calls(raw),
        tools=_tools(a),
        agent_name=where.agent_name or read.text(a, "agent.name"),
        node_path=where.node_path,
        model=read.text(a, "llm.model_name"),
        response_id=_response_id(raw),
        finish=finish,
        temperature=read.number({"t": parameters.get("temperature")}, "t"),
        input_tokens=read.integer(a, "llm.token_count.prompt"),
        output_tokens=read.integer(a, "llm.token_count.completion"),
    )


def tool(span: Span) -> ToolCall:
    """A tool call."""
    a = span.attributes
    name = read.text(a, "tool.name") or span.name
    result = read.parsed(a, "output.value")
    answer = langchain.tool_message(result)
    failed = answer is not None and answer.failed
    return base.tool_call(
        span,
        name=name,
        arguments=read.parsed(a, "input.value"),
        result=answer.content if answer is not None else result,
        call_id=read.text(a, "tool_call.id", "tool.id") or (answer.call_id if answer is not None else None),
        agent_name=langchain.place(_metadata(a)).agent_name or read.text(a, "tool.agent_role"),
        status=ToolStatus.RAISED if failed else None,
    )


def agent(span: Span) -> AgentRun:
    """An agent's run."""
    return base.agent_run(span, read.text(span.attributes, "agent.name", "graph.node.id"))


OPENINFERENCE: Final = Dialect("openinference", kind, llm, tool, agent)


def _metadata(attributes: Attributes) -> JsonObject:
    return fields(read.parsed(attributes, "metadata"))


# --- messages and tools --------------------------------------------------------------------------


def _messages(attributes: Attributes, prefix: str) -> list[Message]:
    return [message for entry in entries(tree(attributes, prefix)) for message in _message(entry)]


def _message(entry: Tree) -> list[Message]:
    results = [fields(base.parse(value)) for value in values(below(entry, "function"))]
    if results:  # AutoGen's: the results of several tools in one message
        return [
            {"role": "tool", "tool_call_id": r.get("call_id"), "content": as_text(r.get("content"))}
            for r in results
        ]
    message: dict[str, Json] = {"role": leaf(entry, "message", "role"), "content": _content(entry)}
    calls = [_tool_call(call) for call in entries(below(entry, "message", "tool_calls"))]
    if calls:
        message["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        value = leaf(entry, "message", key)
        if value is not None:
            message[key] = value
    return [message]


def _content(entry: Tree) -> Json:
    plain = leaf(entry, "message", "content")
    parts = [_part(part) for part in entries(below(entry, "message", "contents"))]
    shown = [part for part in parts if part]
    return shown if shown and plain is None else plain


def _part(entry: Tree) -> JsonObject:
    kind = leaf(entry, "message_content", "type")
    text = leaf(entry, "message_content", "text")
    if kind == "text" and isinstance(text, str):
        return {"type": "text", "text": text}
    url = leaf(entry, "message_content", "image", "image", "url")
    return {"type": "image_url", "image_url": {"url": url}} if isinstance(url, str) else {}


def _tool_call(entry: Tree) -> Json:
    name = leaf(entry, "tool_call", "function", "name")
    if isinstance(name, str):
        name = name.strip("'")  # as CrewAI's events write it
    arguments = leaf(entry, "tool_call", "function", "arguments")
    return base.function_call(leaf(entry, "tool_call", "id"), name, arguments)


def _tools(attributes: Attributes) -> list[JsonObject]:
    listed = [
        base.parse(leaf(entry, "tool", "json_schema")) for entry in entries(tree(attributes, "llm.tools"))
    ]
    return base.tool_definitions(listed or read.parsed(attributes, "llm.tools"))


# --- the raw output ------------------------------------------------------------------------------


def _response_id(raw: Json) -> str | None:
    """Of an OpenAI response, or of LangChain's result."""
    if "choices" in fields(raw):
        return string(fields(raw).get("id"))
    return langchain.response_id(raw)


def _raw_tool_calls(raw: Json) -> Message | None:
    """CrewAI's answers that only call tools are in no output message."""
    calls: list[Json] = []
    for item in items(raw):
        function = fields(fields(item).get("function"))
        if not isinstance(item, Mapping) or not function:
            return None
        calls.append(base.function_call(item.get("id"), function.get("name"), function.get("arguments")))
    return {"role": "assistant", "content": None, "tool_calls": calls} if calls else None
