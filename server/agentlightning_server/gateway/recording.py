"""The gateway's span: the truth of what was sampled, one for each answer, stored before the agent sees it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentlightning import semconv
from agentlightning.messages import messages_to_json, output_to_json
from agentlightning.reading.attributes import pack_logprobs, pack_token_ids
from agentlightning.types import (
    AttributeValue,
    Span,
    SpanKind,
    SpanStatus,
    live_attempt_id,
    live_rollout_id,
)
from agentlightning_server.gateway.requests import ChatRequest
from agentlightning_server.gateway.responses import Choice

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is: the rollout and attempt, and the span under which it was made, if it said so."""

    rollout_id: str
    attempt_id: str
    trace_id: str
    parent_id: str | None

    @classmethod
    def of(cls, traceparent: str | None, rollout_id: str | None, attempt_id: str | None) -> Caller:
        """A caller without a rollout is a live one, named by its trace."""
        match = _TRACEPARENT.fullmatch(traceparent or "")
        trace_id = match.group(1) if match else os.urandom(16).hex()
        parent_id = match.group(2) if match else None
        if rollout_id is None:
            return cls(live_rollout_id(trace_id), live_attempt_id(trace_id), trace_id, parent_id)
        return cls(rollout_id, attempt_id or f"{rollout_id}-1", trace_id, parent_id)


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
    attributes = _request_attributes(request) | {
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
    return _span(caller, request, attributes, start_ns, end_ns, SpanStatus.UNSET, "")


def failure_span(
    caller: Caller, request: ChatRequest, error: BaseException, start_ns: int, end_ns: int
) -> Span:
    """The span of a request that got no answer."""
    attributes = _request_attributes(request) | {semconv.ERROR_TYPE: type(error).__name__}
    message = str(error) or type(error).__name__
    return _span(caller, request, attributes, start_ns, end_ns, SpanStatus.ERROR, message)


def _request_attributes(request: ChatRequest) -> dict[str, AttributeValue]:
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
    return attributes | {name: value for name, value in optional.items() if value is not None}


def _span(
    caller: Caller,
    request: ChatRequest,
    attributes: dict[str, AttributeValue],
    start_ns: int,
    end_ns: int,
    status: SpanStatus,
    message: str,
) -> Span:
    return Span(
        trace_id=caller.trace_id,
        span_id=os.urandom(8).hex(),
        parent_id=caller.parent_id,
        name=f"chat {request.model}",
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
