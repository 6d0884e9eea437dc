"""The chat completion request: what the gateway takes, what it refuses and with which sentence.

Parameters that would change what is sampled and that no engine here honours are refused rather than ignored;
parameters that only label a request (user, metadata, store) are accepted and left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from agentlightning.errors import InvalidInput
from agentlightning.types import JsonObject, Message

MAX_CHOICES = 64
MAX_STOPS = 4  # OpenAI's own limit
REFUSED: Mapping[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": None,
    "functions": None,
    "function_call": None,
    "audio": None,
}
ROLES = ("assistant", "developer", "system", "tool", "user")
GREEDY_BELOW = 1e-5  # a temperature this low only overflows the logits; vLLM draws the line here too


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A validated chat completion request."""

    model: str
    messages: Sequence[Message]
    tools: Sequence[JsonObject] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    n: int = 1
    stream: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    return_token_ids: bool = False
    """vLLM's extension: prompt_token_ids and token_ids in the response."""
    schema: JsonObject | None = None
    """JSON schema that the text of the answer must satisfy, from `response_format`."""
    must_call: Sequence[str] = ()
    """Names of the tools of which the answer must call one, from `tool_choice`."""
    parallel_tool_calls: bool = True


def parse_chat_request(body: object) -> ChatRequest:
    """Validate a decoded JSON body. Raises InvalidInput naming the field and what it must be."""
    if not isinstance(body, Mapping):
        raise InvalidInput("the request body must be a JSON object")
    fields = cast("Mapping[str, Any]", body)
    for name, neutral in REFUSED.items():
        if fields.get(name) not in (None, neutral, {}, []):
            raise InvalidInput(f"'{name}' is not supported by this server; leave it out")
    temperature = _number(fields, "temperature", 1.0, low=0, high=2)
    limit = fields.get("max_completion_tokens")
    limit = fields.get("max_tokens") if limit is None else limit
    tools = [] if fields.get("tool_choice") == "none" else _tools(fields)
    return ChatRequest(
        model=_model(fields),
        messages=_messages(fields.get("messages")),
        tools=tools,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=_number(fields, "top_p", 1.0, low=0, high=1, open_low=True),
        max_tokens=None if limit is None else _whole({"max_tokens": limit}, "max_tokens", low=1),
        stop=_stops(fields.get("stop")),
        seed=None if fields.get("seed") is None else _whole(fields, "seed", low=-(2**63), high=2**64),
        n=1 if fields.get("n") is None else _whole(fields, "n", low=1, high=MAX_CHOICES),
        stream=fields.get("stream") is True,
        logprobs=fields.get("logprobs") is True,
        top_logprobs=0 if not fields.get("top_logprobs") else _whole(fields, "top_logprobs", low=0, high=20),
        return_token_ids=fields.get("return_token_ids") is True,
        schema=response_schema(fields.get("response_format")),
        must_call=_must_call(fields.get("tool_choice"), tools),
        # A function that is named is called once, as with OpenAI.
        parallel_tool_calls=fields.get("parallel_tool_calls") is not False
        and not isinstance(fields.get("tool_choice"), Mapping),
    )


def includes_usage(fields: Mapping[str, Any]) -> bool:
    """Whether a stream shall end with the number of tokens."""
    options = fields.get("stream_options")
    return isinstance(options, Mapping) and cast("Any", options).get("include_usage") is True


def _model(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidInput("'model' must be the name of a model; GET /v1/models lists them")
    return model


def response_schema(value: Any) -> JsonObject | None:
    """The schema that `response_format` asks for; None for free text."""
    form = cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {"type": value or "text"}
    if form.get("type", "text") == "text":
        return None
    if form["type"] == "json_object":
        return {"type": "object"}
    described = form.get("json_schema") if form["type"] == "json_schema" else None
    schema = cast("Any", described).get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidInput(
            "'response_format' must have the type text, json_object, or json_schema with json_schema.schema"
        )
    return cast("JsonObject", schema)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InvalidInput("'messages' must be a non-empty array")
    messages: list[Message] = []
    for position, item in enumerate(cast("list[Any]", value)):
        role = cast("Any", item).get("role") if isinstance(item, Mapping) else None
        if role not in ROLES:
            raise InvalidInput(f"messages[{position}].role must be one of {', '.join(ROLES)}")
        message = cast("Mapping[str, Any]", item)
        _check_content(message.get("content"), position)
        _check_tool_calls(message.get("tool_calls"), position)
        messages.append(message)
    return messages


def _check_content(content: Any, position: int) -> None:
    if content is None or isinstance(content, str):
        return
    parts = cast("list[Any]", content) if isinstance(content, list) else [None]
    for part in parts:
        kind = cast("Any", part).get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "refusal"):
            raise InvalidInput(
                f"messages[{position}].content: only text is supported, got {kind or 'no'} part"
            )
        text = cast("Any", part).get(kind)
        if text is not None and not isinstance(text, str):
            raise InvalidInput(f"messages[{position}].content: the text of a part must be a string")


def _check_tool_calls(calls: Any, position: int) -> None:
    for call in cast("list[Any]", calls or []) if isinstance(calls, list | None) else [None]:
        function = cast("Any", call).get("function") if isinstance(call, Mapping) else None
        name = cast("Any", function).get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise InvalidInput(f"messages[{position}].tool_calls: each needs function.name and .arguments")


def _must_call(value: Any, tools: Sequence[JsonObject]) -> tuple[str, ...]:
    """The tools of which `tool_choice` demands a call; none where the model may choose."""
    if value in (None, "auto", "none"):
        return ()
    names = tuple(str(cast("Any", tool["function"])["name"]) for tool in tools)
    if value != "required":
        function = cast("Any", value).get("function") if isinstance(value, Mapping) else None
        name = cast("Any", function).get("name") if isinstance(function, Mapping) else None
        names = tuple(known for known in names if known == name)
    if not names:
        raise InvalidInput(
            "'tool_choice' must be auto, none, required, or name a function that is among 'tools'"
        )
    return names


def _tools(fields: Mapping[str, Any]) -> list[JsonObject]:
    value = cast("Any", fields.get("tools") or [])
    if not isinstance(value, list):
        raise InvalidInput("'tools' must be an array of objects")
    tools = cast("list[Any]", value)
    for position, tool in enumerate(tools):
        _check_tool(tool, f"tools[{position}]")
    return tools


def _check_tool(tool: Any, where: str) -> None:
    """The parts that prompts are written from; the rest of a schema is the model's to read."""
    function = cast("Any", tool).get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(cast("Any", function).get("name"), str):
        raise InvalidInput(f"{where} must be an object with type 'function' and function.name")
    parameters = cast("Any", function).get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise InvalidInput(f"{where}.function.parameters must be a JSON schema, an object")
    properties = cast("Any", parameters or {}).get("properties")
    if not isinstance(properties, Mapping | None):
        raise InvalidInput(f"{where}.function.parameters.properties must be an object")


def _stops(value: Any) -> tuple[str, ...]:
    stops = cast("Any", [value] if isinstance(value, str) else value or [])
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in cast("list[Any]", stops)):
        raise InvalidInput("'stop' must be a string or an array of non-empty strings")
    if len(cast("list[str]", stops)) > MAX_STOPS:
        raise InvalidInput(f"'stop' takes at most {MAX_STOPS} sequences")
    return tuple(cast("list[str]", stops))


def _number(
    fields: Mapping[str, Any], name: str, default: float, *, low: float, high: float, open_low: bool = False
) -> float:
    value = fields.get(name)
    if value is None:
        return default
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not good or (open_low and value == low):
        raise InvalidInput(f"'{name}' must be a number from {low} to {high}, got {value!r}")
    return float(value)


def _whole(fields: Mapping[str, Any], name: str, *, low: int, high: int | None = None) -> int:
    value = fields.get(name)
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < low
        or (high is not None and value > high)
    ):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise InvalidInput(f"'{name}' must be a whole number {limit}, got {value!r}")
    return value
