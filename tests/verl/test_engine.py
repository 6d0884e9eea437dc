"""The gateway's engine on VeRL, in front of a client that answers as VeRL's does. Needs no VeRL."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from agentlightning.errors import NotFound, PromptTooLong, Unavailable
from agentlightning_server.engines.base import ChatTokenizer, Completion, Sampling
from agentlightning_server.verl.engine import VerlEngine

EOS = 2


@dataclass
class Output:
    """VeRL's TokenOutput."""

    token_ids: list[int]
    stop_reason: str = "completed"
    versions: tuple[int, int] = (4, 4)
    extra_fields: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.extra_fields = dict(zip(("min_global_steps", "max_global_steps"), self.versions, strict=True))

    @property
    def log_probs(self) -> list[float]:
        return [-0.5] * len(self.token_ids)


class Client:
    def __init__(self, output: Output) -> None:
        self.output = output
        self.asked: list[dict[str, Any]] = []

    async def generate(self, request_id: str, **fields: Any) -> Output:
        self.asked.append({"request_id": request_id, **fields})
        return self.output


def engine(client: Client | None) -> VerlEngine:
    made = VerlEngine(
        cast("ChatTokenizer", None),
        base_model="m",
        policy="policy",
        context_length=10,
        eos_ids=frozenset({EOS}),
    )
    made.attach(client)
    return made


def generate(made: VerlEngine, prompt: list[int], sampling: Sampling) -> Completion:
    return asyncio.run(made.generate(prompt, sampling, "policy"))


def test_what_is_asked_of_vllm() -> None:
    client = Client(Output([5, EOS]))
    sampling = Sampling(4, 0.7, 0.9, seed=-1, stop=["\n"], session="attempt-1")
    completion = generate(engine(client), [1, 2, 3], sampling)
    (asked,) = client.asked
    assert (asked["request_id"], asked["prompt_ids"]) == ("attempt-1", [1, 2, 3])
    assert asked["sampling_params"] == {
        "max_tokens": 4,
        "temperature": 0.7,
        "top_p": 0.9,
        "logprobs": True,
        "seed": 2**63 - 1,
        "stop": ["\n"],
        "include_stop_str_in_output": True,
    }
    assert completion == Completion([5, EOS], [-0.5, -0.5], "stop", 4)


def test_the_finish_reason_follows_from_the_tokens() -> None:
    made = engine(Client(Output([5, 6, 7])))
    assert generate(made, [1], Sampling(3)).finish_reason == "length"
    assert generate(made, [1], Sampling(4)).finish_reason == "stop"
    assert generate(made, [1], Sampling(3, should_stop=lambda ids: 7 in ids)).finish_reason == "stop"


def test_a_completion_counts_as_its_oldest_version_and_the_newest_is_served() -> None:
    made = engine(Client(Output([5], versions=(2, 3))))
    assert generate(made, [1], Sampling(1)).policy_version == 2
    assert made.version("policy") == 3


def test_under_a_grammar_log_probabilities_are_of_the_whole_vocabulary() -> None:
    """vLLM gives those of what the grammar leaves, and of a prompt the true ones."""
    pytest.importorskip("vllm")

    class Telling(Client):
        async def generate(self, request_id: str, **fields: Any) -> Output:
            answer = await super().generate(request_id, **fields)
            if "prompt_logprobs" in fields["sampling_params"]:
                told = [[-float(token)] for token in fields["prompt_ids"][1:]]
                answer.extra_fields |= {"prompt_logprobs": [*told, [0.0]], "global_steps": 4}
            return answer

    client = Telling(Output([5, 6]))
    completion = generate(engine(client), [1, 3], Sampling(4, grammar="start: /x/"))
    assert completion.logprobs == [-5.0, -6.0]
    assert client.asked[1]["prompt_ids"] == [1, 3, 5, 6]


def test_requests_wait_while_there_is_no_vllm() -> None:
    with pytest.raises(Unavailable, match="starting"):
        generate(engine(None), [1], Sampling(1))
    with pytest.raises(Unavailable, match="updated"):
        generate(engine(Client(Output([], "aborted"))), [1], Sampling(1))


def test_limits() -> None:
    client = Client(Output([5]))
    generate(engine(client), [1] * 8, Sampling(100))
    assert client.asked[0]["sampling_params"]["max_tokens"] == 2
    with pytest.raises(PromptTooLong, match="max_model_len"):
        generate(engine(client), [1] * 10, Sampling(1))
    with pytest.raises(NotFound, match="other"):
        engine(client).version("other")
