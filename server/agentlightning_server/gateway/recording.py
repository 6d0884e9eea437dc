"""The gateway's span: the truth of what was answered, one for each answer, stored before the agent sees it.

An answer of a policy has its token ids, log-probabilities and policy version. One that another endpoint gave
has none of them, and no policy's name: it is context in its episode and never trained on.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, cast

from agentlightning import semconv
from agentlightning.errors import InvalidInput
from agentlightning.messages import messages_to_json, output_to_json
from agentlightning.reading.attributes import pack_logprobs, pack_token_ids
from agentlightning.types import (
    Attributes,
    AttributeValue,
    JsonObject,
    Message,
    Span,
    SpanKind,
    SpanStatus,
    live_attempt_id,
    live_rollout_id,
)
from agentlightning_server.gateway.requests import ChatRequest, response_schema
from agentlightning_server.gateway.responses import Choice
from agentlightning_server.store.schema import DEFAULT_PROJECT

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}")


_ids = random.Random(os.urandom(32))


def new_id(size: int) -> str:
    """A random id of that many bytes, in hex; the kernel is not asked, for that yields to other threads."""
    return f"{_ids.getrandbits(8 * size) or 1:0{2 * size}x}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is: the rollout and attempt, and the span under which it was made, if it said so."""

    rollout_id: str
    attempt_id: str
    trace_id: str
    parent_id: str | None
    project: str = DEFAULT_PROJECT

    @property
    def conversation(self) -> str:
        """Whose recorded calls this one may continue."""
        return f"{self.project}/{self.attempt_id}"

    @classmethod
    def of(
        cls,
        traceparent: str | None,
        rollout_id: str | None,
        attempt_id: str | None,
        project: str = DEFAULT_PROJECT,
    ) -> Caller:
        """A caller without a rollout is a live one, named by its trace."""
        match = _TRACEPARENT.fullmatch(traceparent or "")
        trace_id = match.group(1) if match else new_id(16)
        parent_id = match.group(2) if match else None
        if rollout_id is None:
            return cls(live_rollout_id(trace_id), live_attempt_id(trace_id), trace_id, parent_id, project)
        return cls(rollout_id, attempt_id or f"{rollout_id}-1", trace_id, parent_id, project)


@dataclass(frozen=True, slots=True)
class Served:
    """What one request was served with."""

    response_id: str
    policy: str
    policy_version: int
    prompt_ids: Sequence[int]
    continued: bool
    malformed: str | None = None


def answer_span(
    caller: Caller, request: ChatRequest, choice: Choice, served: Served, start_ns: int, end_ns: int
) -> Span:
    """The span of one sampled answer, token ids and logprobs included."""
    completion = choice.completion
    attributes = request_attributes(request) | {
        semconv.OUTPUT_MESSAGES: output_to_json(choice.message, choice.finish_reason),
        semconv.RESPONSE_ID: served.response_id,
        semconv.RESPONSE_MODEL: served.policy,
        semconv.RESPONSE_FINISH_REASONS: [choice.finish_reason],
        semconv.USAGE_INPUT: len(served.prompt_ids),
        semconv.USAGE_OUTPUT: len(completion.token_ids),
        semconv.PROMPT_IDS: pack_token_ids(served.prompt_ids),
        semconv.RESPONSE_IDS: pack_token_ids(completion.token_ids),
        semconv.RESPONSE_LOGPROBS: pack_logprobs(completion.logprobs),
        semconv.POLICY_NAME: served.policy,
        semconv.POLICY_VERSION: served.policy_version,
        semconv.PROMPT_CONTINUED: served.continued,
        semconv.CHOICE_INDEX: choice.index,
    }
    if served.malformed is not None:
        attributes[semconv.MALFORMED_TOOL_CALL] = served.malformed
    return _span(caller, attributes, start_ns, end_ns, SpanStatus.UNSET, "")


def forwarded_span(
    caller: Caller, attributes: Attributes, body: Mapping[str, Any], position: int, start_ns: int, end_ns: int
) -> Span:
    """The span of one answer that another endpoint gave: the choice at this position of its `body`."""
    choice = body["choices"][position]
    reason = choice.get("finish_reason")
    usage: Any = (body.get("usage") if position == 0 else None) or {}  # it counts all choices together
    answered: dict[str, AttributeValue] = {
        semconv.OUTPUT_MESSAGES: output_to_json(choice["message"], reason),
        semconv.RESPONSE_ID: body["id"],
        semconv.RESPONSE_MODEL: body.get("model"),
        semconv.RESPONSE_FINISH_REASONS: [reason] if reason else None,
        semconv.USAGE_INPUT: usage.get("prompt_tokens"),
        semconv.USAGE_OUTPUT: usage.get("completion_tokens"),
        semconv.CHOICE_INDEX: choice["index"],
    }
    known = {name: value for name, value in answered.items() if value is not None}
    return _span(caller, {**attributes, **known}, start_ns, end_ns, SpanStatus.UNSET, "")


def failure_span(
    caller: Caller, attributes: Attributes, error: BaseException, start_ns: int, end_ns: int
) -> Span:
    """The span of a request that got no answer; `attributes` are those of the request."""
    message = str(error) or type(error).__name__
    failed = {**attributes, semconv.ERROR_TYPE: type(error).__name__}
    return _span(caller, failed, start_ns, end_ns, SpanStatus.ERROR, message)


_PASSED_ON: Final[Mapping[str, str]] = {
    "temperature": semconv.REQUEST_TEMPERATURE,
    "top_p": semconv.REQUEST_TOP_P,
    "seed": semconv.REQUEST_SEED,
    "n": semconv.REQUEST_CHOICES,
    "max_tokens": semconv.REQUEST_MAX_TOKENS,
    "max_completion_tokens": semconv.REQUEST_MAX_TOKENS,
}


def forwarded_attributes(fields: Mapping[str, Any]) -> dict[str, AttributeValue]:
    """What a request says that is passed on as it is, whatever of it can be read."""
    given: Any = fields.get("messages")
    items = cast("list[Any]", given) if isinstance(given, list) else []
    messages = [cast("Message", item) for item in items if isinstance(item, Mapping)]
    attributes: dict[str, AttributeValue] = {
        semconv.OPERATION: semconv.OP_CHAT,
        semconv.PROVIDER: "openai",  # the conventions' name for endpoints that speak its API
        semconv.REQUEST_MODEL: fields["model"],
        semconv.REQUEST_STREAM: fields.get("stream") is True,
        semconv.INPUT_MESSAGES: messages_to_json(messages),
    }
    for field, name in _PASSED_ON.items():
        if isinstance(fields.get(field), int | float):
            attributes[name] = fields[field]
    if isinstance(fields.get("tools"), list) and fields["tools"]:
        attributes[semconv.TOOL_DEFINITIONS] = json.dumps(fields["tools"], ensure_ascii=False)
    with suppress(InvalidInput, LookupError, TypeError, AttributeError):  # what it means is the endpoint's
        attributes |= _asked_form(response_schema(fields.get("response_format")))
    return attributes


def _asked_form(schema: JsonObject | None) -> dict[str, AttributeValue]:
    """That JSON was asked for, and of which schema."""
    if schema is None:
        return {}
    written = json.dumps(schema, ensure_ascii=False)
    return {semconv.OUTPUT_TYPE: "json", semconv.RESPONSE_SCHEMA: written}


def request_attributes(request: ChatRequest) -> dict[str, AttributeValue]:
    """What a request of a policy says."""
    attributes: dict[str, AttributeValue] = {
        semconv.OPERATION: semconv.OP_CHAT,
        semconv.PROVIDER: "agentlightning",
        semconv.REQUEST_MODEL: request.model,
        semconv.REQUEST_TEMPERATURE: request.temperature,
        semconv.REQUEST_TOP_P: request.top_p,
        semconv.REQUEST_STREAM: request.stream,
        semconv.INPUT_MESSAGES: messages_to_json(request.messages),
    }
    optional: dict[str, Any] = {
        semconv.REQUEST_MAX_TOKENS: request.max_tokens,
        semconv.REQUEST_SEED: request.seed,
        semconv.REQUEST_STOP: list(request.stop) or None,
        semconv.REQUEST_CHOICES: request.n if request.n > 1 else None,
        semconv.TOOL_DEFINITIONS: json.dumps(list(request.tools), ensure_ascii=False)
        if request.tools
        else None,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return attributes | _asked_form(request.schema) | given


def _span(
    caller: Caller,
    attributes: Attributes,
    start_ns: int,
    end_ns: int,
    status: SpanStatus,
    message: str,
) -> Span:
    return Span(
        trace_id=caller.trace_id,
        span_id=new_id(8),
        parent_id=caller.parent_id,
        name=f"chat {attributes[semconv.REQUEST_MODEL]}",
        kind=SpanKind.SERVER,
        start_ns=start_ns,
        end_ns=end_ns,
        status=status,
        status_message=message,
        attributes=attributes,
        scope=semconv.SCOPE_GATEWAY,
        rollout_id=caller.rollout_id,
        attempt_id=caller.attempt_id,
    )
