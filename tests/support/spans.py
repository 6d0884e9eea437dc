"""Spans as the gateway and the adapters write them, for tests of what reads them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from agentlightning import semconv
from agentlightning.messages import messages_to_json, output_to_json
from agentlightning.reading.attributes import pack_logprobs, pack_token_ids
from agentlightning.types import (
    Attempt,
    AttemptStatus,
    Message,
    Rollout,
    RolloutStatus,
    Span,
    SpanKind,
    SpanStatus,
    Task,
    ToolStatus,
)

TRACE = "a" * 32
_ids = itertools.count(1)


def new_id() -> str:
    return f"{next(_ids):016x}"


def rollout(**changes: Any) -> Rollout:
    values: dict[str, Any] = {
        "id": "r1",
        "task": Task("t1", {"question": "?"}),
        "group_id": "g1",
        "status": RolloutStatus.SUCCEEDED,
    }
    return Rollout(**{**values, **changes})


def attempt(**changes: Any) -> Attempt:
    values: dict[str, Any] = {
        "id": "r1-1",
        "rollout_id": "r1",
        "number": 1,
        "worker_id": "w",
        "status": AttemptStatus.SUCCEEDED,
    }
    return Attempt(**{**values, **changes})


def span(name: str, at: int, attributes: Mapping[str, Any], **changes: Any) -> Span:
    values: dict[str, Any] = {
        "trace_id": TRACE,
        "span_id": new_id(),
        "parent_id": None,
        "name": name,
        "kind": SpanKind.INTERNAL,
        "start_ns": at,
        "end_ns": at + 10,
        "attributes": attributes,
        "rollout_id": "r1",
        "attempt_id": "r1-1",
    }
    return Span(**{**values, **changes})


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def gateway_call(
    at: int,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    messages: Sequence[Message] = (),
    output: Message | None = None,
    extra: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Span:
    attributes: dict[str, Any] = {
        semconv.OPERATION: semconv.OP_CHAT,
        semconv.REQUEST_TEMPERATURE: 1.0,
        semconv.INPUT_MESSAGES: messages_to_json(messages),
        semconv.OUTPUT_MESSAGES: output_to_json(output or {"role": "assistant", "content": "ok"}, "stop"),
        semconv.RESPONSE_FINISH_REASONS: ["stop"],
        semconv.PROMPT_IDS: pack_token_ids(prompt),
        semconv.RESPONSE_IDS: pack_token_ids(response),
        semconv.RESPONSE_LOGPROBS: pack_logprobs([-0.5] * len(response)),
        semconv.POLICY_NAME: "policy",
        semconv.POLICY_VERSION: 3,
        **(extra or {}),
    }
    return span("chat policy", at, attributes, scope=semconv.SCOPE_GATEWAY, kind=SpanKind.SERVER, **changes)


def adapter_call(
    at: int,
    *,
    messages: Sequence[Message] = (),
    output: Message | None = None,
    agent: str | None = None,
    response_id: str | None = None,
    **changes: Any,
) -> Span:
    attributes: dict[str, Any] = {
        semconv.OPERATION: semconv.OP_CHAT,
        semconv.INPUT_MESSAGES: messages_to_json(messages),
        semconv.OUTPUT_MESSAGES: output_to_json(output or {"role": "assistant", "content": "ok"}, "stop"),
    }
    if agent is not None:
        attributes[semconv.AGENT_NAME] = agent
    if response_id is not None:
        attributes[semconv.RESPONSE_ID] = response_id
    return span("chat policy", at, attributes, kind=SpanKind.CLIENT, **changes)


def tool(
    at: int,
    name: str = "calculator",
    *,
    arguments: str = '{"expression": "1 + 1"}',
    result: str = "2",
    status: ToolStatus = ToolStatus.OK,
    call_id: str | None = None,
    **changes: Any,
) -> Span:
    attributes: dict[str, Any] = {
        semconv.OPERATION: semconv.OP_TOOL,
        semconv.TOOL_NAME: name,
        semconv.TOOL_ARGUMENTS: arguments,
        semconv.TOOL_RESULT: result,
        semconv.TOOL_STATUS: status.value,
    }
    if call_id is not None:
        attributes[semconv.TOOL_CALL_ID] = call_id
    failed = status is not ToolStatus.OK
    return span(
        f"execute_tool {name}",
        at,
        attributes,
        status=SpanStatus.ERROR if failed else SpanStatus.OK,
        status_message="it failed" if failed else "",
        **changes,
    )


def agent_run(at: int, name: str, **changes: Any) -> Span:
    attributes = {semconv.OPERATION: semconv.OP_AGENT, semconv.AGENT_NAME: name}
    return span(f"invoke_agent {name}", at, attributes, **changes)


def reward(at: int, value: float, name: str = "reward", target: str | None = None) -> Span:
    attributes: dict[str, Any] = {semconv.REWARD_VALUE: value, semconv.REWARD_NAME: name}
    if target is not None:
        attributes[semconv.REWARD_TARGET] = target
    return span("reward", at, attributes, scope=semconv.SCOPE_REWARD)
