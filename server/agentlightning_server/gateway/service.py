"""The gateway: a chat completion request in, sampled and recorded answers out.

A routed model name is answered by its upstream instead of the engine, and recorded all the same. The gateway
knows messages, prompts and spans; it knows neither HTTP nor how the engine computes. Invariant: an answer is
returned only after its span is stored, so whatever an agent acted on can be trained on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import uuid4

from agentlightning.errors import InvalidInput, ModelNotFound, PromptTooLong
from agentlightning.types import Attributes, JsonObject, Span
from agentlightning_server.engines.base import Completion, Sampling, ServingEngine
from agentlightning_server.gateway.grammars import grammar_of
from agentlightning_server.gateway.prompts import Prompt, PromptBuilder
from agentlightning_server.gateway.recording import (
    Caller,
    Served,
    answer_span,
    failure_span,
    forwarded_attributes,
    forwarded_span,
    request_attributes,
)
from agentlightning_server.gateway.requests import ChatRequest
from agentlightning_server.gateway.responses import Answer, Choice
from agentlightning_server.gateway.toolcalls import Parsed, assistant_message
from agentlightning_server.gateway.upstreams import Upstreams

T = TypeVar("T")
RecordSpans = Callable[[str, Sequence[Span]], Awaitable[object]]
"""Stores spans of a project."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What the gateway decides for requests that leave it open."""

    default_max_tokens: int = 512
    """Response tokens where the request names no limit (an agent without one would fill the context)."""
    continue_calls: bool = True
    """Build a prompt that extends an earlier call from its recorded ids. Off, every prompt is rendered anew,
    as other gateways do it; that is for measuring the difference."""


class Gateway:
    """Serves an engine's policies to agents, and what upstreams answer, and records it."""

    def __init__(
        self,
        engine: ServingEngine,
        record: RecordSpans,
        settings: GatewaySettings | None = None,
        upstreams: Upstreams | None = None,
    ) -> None:
        """Raises InvalidInput for an upstream under the name of a policy."""
        self._engine = engine
        self._record = record
        self._settings = settings or GatewaySettings()
        self.upstreams = upstreams or Upstreams()
        self.prompts = PromptBuilder(
            engine.tokenizer, engine.eos_ids, continue_calls=self._settings.continue_calls
        )
        for name in self.upstreams.models:
            if self._policy(name) is not None:
                raise InvalidInput(f"the upstream '{name}' has the name of a policy: give it another one")

    @property
    def base_model(self) -> str:
        """Name of the model behind the policies."""
        return self._engine.base_model

    @property
    def models(self) -> list[tuple[str, int]]:
        """(policy name, policy version), the default first."""
        return [(name, self._engine.version(name)) for name in self._engine.policies]

    def policy_of(self, model: str) -> str:
        """The policy a model name asks for: its own name, or the base model's for the default policy."""
        policy = self._policy(model)
        if policy is None:
            served = ", ".join([*self._engine.policies, *self.upstreams.models])
            raise ModelNotFound(
                f"the model '{model:.200}' does not exist on this server, which serves: {served}"
            )
        return policy

    def _policy(self, model: str) -> str | None:
        if model in self._engine.policies:
            return model
        base = self._engine.base_model
        return self._engine.policies[0] if model in (base, base.rsplit("/", 1)[-1]) else None

    async def complete(self, request: ChatRequest, caller: Caller) -> Answer:
        """Sample, record, answer. A failed or cancelled request leaves a span with its error.

        Raises ModelNotFound, PromptTooLong, InvalidInput, Unavailable.
        """
        start_ns = time.time_ns()
        work = self._complete(request, caller, start_ns)
        return await self._noting_failure(work, caller, lambda: request_attributes(request), start_ns)

    async def forward(self, fields: JsonObject, caller: Caller) -> dict[str, Any]:
        """Have a routed model's upstream answer a request's body, record, and return the answer's body.

        Raises UpstreamError; a failed or cancelled request leaves a span with its error.
        """
        start_ns = time.time_ns()
        attributes = forwarded_attributes(fields)
        work = self._forward(fields, caller, attributes, start_ns)
        return await self._noting_failure(work, caller, lambda: attributes, start_ns)

    async def _noting_failure(
        self,
        work: Coroutine[Any, Any, T],
        caller: Caller,
        attributes: Callable[[], Attributes],
        start_ns: int,
    ) -> T:
        try:
            return await work
        except asyncio.CancelledError:
            gone = ConnectionError("the client disconnected before the answer was complete")
            await self._record(
                caller.project, [failure_span(caller, attributes(), gone, start_ns, time.time_ns())]
            )
            raise
        except Exception as error:
            await self._record(
                caller.project, [failure_span(caller, attributes(), error, start_ns, time.time_ns())]
            )
            raise

    async def _forward(
        self, fields: JsonObject, caller: Caller, attributes: Attributes, start_ns: int
    ) -> dict[str, Any]:
        body = await self.upstreams.complete(fields)
        end_ns = time.time_ns()
        positions = range(len(body["choices"]))
        await self._record(
            caller.project, [forwarded_span(caller, attributes, body, i, start_ns, end_ns) for i in positions]
        )
        return body

    async def _complete(self, request: ChatRequest, caller: Caller, start_ns: int) -> Answer:
        policy = self.policy_of(request.model)
        prompt = self.prompts.build(request.messages, request.tools, caller.conversation)
        completions = await self._sample(request, prompt, policy, caller.attempt_id)
        parsed = [self._read(request, completion) for completion in completions]
        choices = [
            Choice(i, assistant_message(p), c)
            for i, (p, c) in enumerate(zip(parsed, completions, strict=True))
        ]
        served = Served(
            response_id=f"chatcmpl-{uuid4().hex}",
            policy=policy,
            policy_version=completions[0].policy_version,
            prompt_ids=prompt.token_ids,
            continued=prompt.continued,
        )
        end_ns = time.time_ns()
        await self._record(
            caller.project,
            [
                answer_span(caller, request, choice, replace(served, malformed=p.malformed), start_ns, end_ns)
                for choice, p in zip(choices, parsed, strict=True)
            ],
        )
        for choice in choices:
            self.prompts.record(
                request.messages,
                request.tools,
                caller.conversation,
                choice.message,
                prompt.token_ids,
                choice.completion.token_ids,
            )
        return Answer(served.response_id, request.model, prompt.token_ids, choices, served.policy_version)

    async def _sample(
        self, request: ChatRequest, prompt: Prompt, policy: str, session: str
    ) -> list[Completion]:
        room = self._engine.context_length - len(prompt.token_ids)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt.token_ids)} tokens and the model reads at most "
                f"{self._engine.context_length} with the response: shorten the messages or serve with a "
                "longer context"
            )
        limit = min(room, request.max_tokens or self._settings.default_max_tokens)
        sampling = Sampling(
            max_tokens=limit,
            temperature=request.temperature,
            top_p=request.top_p,
            should_stop=self._stopper(request.stop),
            stop=tuple(request.stop),
            top_logprobs=request.top_logprobs if request.logprobs else 0,
            grammar=grammar_of(request, self.prompts.tool_format),
            session=session,
        )
        seeds = [None if request.seed is None else request.seed + i for i in range(request.n)]
        return await asyncio.gather(
            *(self._engine.generate(prompt.token_ids, replace(sampling, seed=s), policy) for s in seeds)
        )

    def _stopper(self, stops: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """Whether one of the stop strings ends the text so far; looks at the tail only."""
        if not stops:
            return None
        tail = max(len(stop) for stop in stops) + 8  # a token is at least one byte of a character

        def should_stop(token_ids: Sequence[int]) -> bool:
            text = self.prompts.decode(token_ids[-tail:])
            return any(stop in text for stop in stops)

        return should_stop

    def _read(self, request: ChatRequest, completion: Completion) -> Parsed:
        text = self.prompts.decode(completion.token_ids)
        cuts = [text.index(stop) for stop in request.stop if stop in text]
        text = text[: min(cuts)] if cuts else text
        return self.prompts.tool_format.parse(text) if request.tools else Parsed(text)
