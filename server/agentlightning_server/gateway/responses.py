"""Completions -> OpenAI's response bodies, whole or as a stream of server-sent events.

A stream is cut from the finished, recorded body, our own or another endpoint's, so that streaming or not
stores the very same answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from agentlightning.types import Message
from agentlightning_server.engines.base import Completion
from agentlightning_server.gateway.prompts import PromptBuilder
from agentlightning_server.gateway.requests import ChatRequest

CHUNK_CHARACTERS = 16  # of content in one server-sent event
_WHOLE_ONLY = frozenset({"choices", "usage", "prompt_token_ids"})  # keys of a body that chunks do not repeat
_PART_KEYS = frozenset({"index", "message", "logprobs", "finish_reason"})
_DELTA_KEYS = frozenset({"role", "content", "tool_calls"})


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a request."""

    index: int
    message: Message
    completion: Completion

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.message.get("tool_calls") else self.completion.finish_reason


@dataclass(frozen=True, slots=True)
class Answer:
    """All answers of a request."""

    response_id: str
    model: str
    prompt_ids: Sequence[int]
    choices: Sequence[Choice]
    policy_version: int

    @property
    def fingerprint(self) -> str:
        """Survives LangChain's streams, where the response id does not."""
        return f"policy-v{self.policy_version}"


def chat_completion(request: ChatRequest, answer: Answer, prompts: PromptBuilder) -> dict[str, Any]:
    """The body of a `chat.completion`."""
    body: dict[str, Any] = {
        "id": answer.response_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": answer.model,
        "system_fingerprint": answer.fingerprint,
        "choices": [
            {
                "index": choice.index,
                "message": choice.message,
                "logprobs": _logprobs(choice.completion, prompts, request),
                "finish_reason": choice.finish_reason,
                **({"token_ids": list(choice.completion.token_ids)} if request.return_token_ids else {}),
            }
            for choice in answer.choices
        ],
        "usage": _usage(answer),
    }
    if request.return_token_ids:
        body["prompt_token_ids"] = list(answer.prompt_ids)
    return body


def events(body: Mapping[str, Any], *, include_usage: bool) -> Iterator[bytes]:
    """The server-sent events that stream a whole `chat.completion`, the closing `[DONE]` included."""
    kept = {key: value for key, value in body.items() if key not in _WHOLE_ONLY}
    head = b"data: " + orjson.dumps({**kept, "object": "chat.completion.chunk"})[:-1]
    for choice in body["choices"]:
        message, logprobs = choice["message"], choice.get("logprobs")
        index = choice["index"]
        for delta in _deltas(message):
            yield _event(head, _part(index, delta, logprobs))
            logprobs = None
        more = {key: value for key, value in choice.items() if key not in _PART_KEYS}
        last = _part(index, b"{}", None, choice.get("finish_reason"))
        yield _event(head, last[:-1] + (b"," + orjson.dumps(more)[1:] if more else b"}"))
    if include_usage:
        yield head + b',"choices":[],"usage":' + orjson.dumps(body.get("usage")) + b"}\n\n"
    yield b"data: [DONE]\n\n"


def _deltas(message: Message) -> Iterator[bytes]:
    content = message.get("content")
    yield (
        b'{"role":"assistant","content":""}'
        if content is not None
        else b'{"role":"assistant","content":null}'
    )
    for key, value in message.items():  # what reasoning models add, say
        if key not in _DELTA_KEYS and value:
            yield orjson.dumps({key: value})
    if isinstance(content, str):
        for start in range(0, len(content), CHUNK_CHARACTERS):
            yield b'{"content":' + orjson.dumps(content[start : start + CHUNK_CHARACTERS]) + b"}"
    calls: Any = message.get("tool_calls") or ()
    for index, call in enumerate(calls):
        yield orjson.dumps({"tool_calls": [{"index": index, **call}]})


def _part(index: Any, delta: bytes, logprobs: Any, finish_reason: str | None = None) -> bytes:
    rest = b'"delta":%b,"logprobs":%b,"finish_reason":%b}'
    shown = rest % (delta, _dumped(logprobs), _dumped(finish_reason))
    return b'{"index":' + orjson.dumps(index) + b"," + shown


def _dumped(value: Any) -> bytes:
    return b"null" if value is None else orjson.dumps(value)


def _event(head: bytes, part: bytes) -> bytes:
    return b'%b,"choices":[%b]}\n\n' % (head, part)


def _usage(answer: Answer) -> dict[str, int]:
    sampled = sum(len(choice.completion.token_ids) for choice in answer.choices)
    read = len(answer.prompt_ids)
    return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}


def _logprobs(completion: Completion, prompts: PromptBuilder, request: ChatRequest) -> dict[str, Any] | None:
    if not request.logprobs:
        return None
    alternatives = completion.top_logprobs or [()] * len(completion.token_ids)
    content = [
        {**_token(prompts, token_id, logprob), "top_logprobs": [_token(prompts, i, lp) for i, lp in top]}
        for token_id, logprob, top in zip(
            completion.token_ids, completion.logprobs, alternatives, strict=True
        )
    ]
    return {"content": content, "refusal": None}


def _token(prompts: PromptBuilder, token_id: int, logprob: float) -> dict[str, Any]:
    text = prompts.decode_token(token_id)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
