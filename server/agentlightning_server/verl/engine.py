"""VeRL's vLLM servers as the gateway's engine: token ids in, token ids out, through VeRL's own client.

That client balances over the replicas, keeps a session on one of them (its prompts share a prefix), and knows
the version of the weights. VeRL's trainer updates, saves and loads; so this serves and does nothing else.
Before VeRL is up, and when no replica is left, requests are told to come again.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol
from uuid import uuid4

from agentlightning.errors import InvalidInput, NotFound, PromptTooLong, Unavailable
from agentlightning_server.engines.base import ChatTokenizer, Completion, FinishReason, Sampling

logger = logging.getLogger(__name__)

STARTING_S = 5.0  # what a request is told to wait while VeRL starts, which takes a minute at least
REPLICA_LOST_S = 1.0


class LLMClient(Protocol):
    """VeRL's `LLMServerClient`."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]
    ) -> Any: ...


class VerlEngine:
    """A `ServingEngine` of one policy."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        base_model: str,
        policy: str,
        context_length: int,
        eos_ids: frozenset[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._base_model = base_model
        self._policy = policy
        self._context_length = context_length
        self._eos_ids = eos_ids
        self._client: LLMClient | None = None
        self._version = 0

    def attach(self, client: LLMClient | None) -> None:
        """VeRL is up, or gone with None."""
        self._client = client

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._tokenizer

    @property
    def base_model(self) -> str:
        return self._base_model

    @property
    def policies(self) -> Sequence[str]:
        return (self._policy,)

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    def version(self, policy: str) -> int:
        """The newest version that a completion was sampled by."""
        if policy != self._policy:
            raise NotFound(f"there is no policy {policy!r}; this engine has {self._policy}")
        return self._version

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, policy: str) -> Completion:
        """See `engines.base.ServingEngine.generate`. Cancelling leaves vLLM to finish for nobody."""
        self.version(policy)
        client = self._client
        if client is None:
            raise Unavailable("VeRL is starting: the model is not served yet", retry_after_s=STARTING_S)
        room = self._context_length - len(prompt_ids)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens and vLLM reads {self._context_length} with the "
                "answer: shorten the conversation, or raise actor_rollout_ref.rollout.max_model_len"
            )
        limit = min(sampling.max_tokens, room)
        output = await self._asked(client, list(prompt_ids), sampling, limit)
        completion = self._completion(output, sampling, limit)
        if sampling.grammar is None:
            return completion
        return await self._unlimited(client, list(prompt_ids), sampling, completion)

    async def _unlimited(
        self, client: LLMClient, prompt_ids: list[int], sampling: Sampling, completion: Completion
    ) -> Completion:
        """The completion with the log-probabilities of the whole vocabulary, which the trainer computes too.

        Under a grammar vLLM gives those of the tokens that it leaves; the others it tells for a prompt.
        """
        text = [*prompt_ids, *completion.token_ids]
        if len(text) >= self._context_length:
            return completion
        plain = replace(sampling, grammar=None, stop=())
        output = await self._asked(client, text, plain, 1, prompt_logprobs=0)
        found = output.extra_fields.get("prompt_logprobs")
        if found is None or output.extra_fields.get("global_steps") != completion.policy_version:
            logger.warning("the log-probabilities of a call with a grammar are those of its grammar")
            return completion
        told = [float(entry[0]) for entry in found]  # of the text's second token on
        first = len(prompt_ids) - 1
        return replace(completion, logprobs=told[first : first + len(completion.token_ids)])

    async def _asked(
        self, client: LLMClient, prompt_ids: list[int], sampling: Sampling, limit: int, **more: Any
    ) -> Any:
        session = sampling.session or uuid4().hex
        try:
            return await client.generate(
                session, prompt_ids=prompt_ids, sampling_params=_parameters(sampling, limit) | more
            )
        except Exception as error:
            raise await _translated(error, client, session) from error

    def _completion(self, output: Any, sampling: Sampling, limit: int) -> Completion:
        tokens = [int(token) for token in output.token_ids]
        if output.stop_reason == "aborted" or not tokens:
            raise Unavailable("the policy is being updated", retry_after_s=1.0)
        self._version = max(self._version, int(output.extra_fields["max_global_steps"] or 0))
        return Completion(
            token_ids=tokens,
            logprobs=[float(value) for value in output.log_probs],
            finish_reason=self._finish(tokens, sampling, limit),
            policy_version=int(output.extra_fields["min_global_steps"] or 0),
        )

    def _finish(self, tokens: Sequence[int], sampling: Sampling, limit: int) -> FinishReason:
        """VeRL does not say which it was."""
        stopped = tokens[-1] in self._eos_ids or len(tokens) < limit
        return "stop" if stopped or (sampling.should_stop and sampling.should_stop(tokens)) else "length"

    def close(self) -> None:
        self._client = None


def _parameters(sampling: Sampling, limit: int) -> dict[str, Any]:
    """As vLLM's SamplingParams take them."""
    given: dict[str, Any] = {
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "logprobs": True,
    }
    if sampling.seed is not None:
        given["seed"] = sampling.seed % 2**63
    if sampling.stop:
        given |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
    if sampling.grammar is not None:
        from vllm.sampling_params import StructuredOutputsParams

        given["structured_outputs"] = StructuredOutputsParams(grammar=sampling.grammar)
    return given


async def _translated(error: Exception, client: Any, session: str) -> Exception:
    """What Ray raises, as the gateway's callers know it; anything else as it is."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        if isinstance(error, ValueError):  # Ray makes an error of the cause's kind, too
            return InvalidInput(f"vLLM refused the request: {_last_line(error)}")
        if "No available servers" in str(error):
            return Unavailable("no vLLM replica is left", retry_after_s=STARTING_S)
    if isinstance(error, RayActorError | RayTaskError):
        await _forget_replica(client, session)
        return Unavailable(f"a vLLM replica died: {_last_line(error)}", retry_after_s=REPLICA_LOST_S)
    return error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


async def _forget_replica(client: Any, session: str) -> None:
    """Take the replica that holds this session out of VeRL's balancer, which does not notice by itself."""
    balancer = client._load_balancer
    server, _ = await balancer.acquire_server.remote(request_id=session)
    await balancer.remove_servers.remote([server])
    logger.warning("the vLLM replica %s died; the others go on", server)
