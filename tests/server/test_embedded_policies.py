"""Several policies in one engine: adapters on one base that learn, are served and are kept each by itself."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.server.embedded_support import batch_of, plain_logprobs, plain_model, some_tokens, tiny_engine

from agentlightning.errors import InvalidInput, NotFound
from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded import EmbeddedEngine

PROMPTS = [some_tokens(seed, 12) for seed in range(4)]
ADVANTAGES = [1.0, -1.0, 0.5, -0.5]
TWO: dict[str, Any] = {"policies": ("writer", "rewriter"), "lora_rank": 4, "learning_rate": 1e-2}

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call


async def ask(engine: EmbeddedEngine, policies: Sequence[str]) -> list[list[Completion]]:
    """Everything at once: the prompts, each with its seed, of each policy."""

    async def one(policy: str, i: int) -> Completion:
        return await engine.generate(PROMPTS[i], Sampling(max_tokens=10, seed=i), policy)

    flat = await asyncio.gather(*(one(policy, i) for policy in policies for i in range(len(PROMPTS))))
    return [flat[start : start + len(PROMPTS)] for start in range(0, len(flat), len(PROMPTS))]


def sampled(engine: EmbeddedEngine, *policies: str) -> list[list[Completion]]:
    return asyncio.run(ask(engine, policies))


def learn(engine: EmbeddedEngine, policy: str, times: int = 2) -> None:
    for _ in range(times):
        (completions,) = sampled(engine, policy)
        engine.update(replace(batch_of(PROMPTS, completions, ADVANTAGES), policy=policy))


def logprobs(completions: Sequence[Completion]) -> list[list[float]]:
    return [list(c.logprobs) for c in completions]


def adapter(engine: EmbeddedEngine, policy: str) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in engine._policies[policy].weights.trainable_state().items()}


def test_an_update_of_one_policy_leaves_the_other_and_the_base_as_they_were(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model", **TWO)
    before = sampled(engine, "writer", "rewriter")
    assert logprobs(before[0]) == logprobs(before[1])  # both start as the base model
    base = {n: p.clone() for n, p in engine._policies["writer"].weights.model.named_parameters()}
    other = adapter(engine, "rewriter")
    learn(engine, "writer")
    after = sampled(engine, "writer", "rewriter")
    assert logprobs(after[1]) == logprobs(before[1])
    assert logprobs(after[0]) != logprobs(before[0])
    assert (engine.version("writer"), engine.version("rewriter")) == (2, 0)
    assert {c.policy_version for c in after[0]} == {2}
    assert {c.policy_version for c in after[1]} == {0}
    assert all(torch.equal(value, other[name]) for name, value in adapter(engine, "rewriter").items())
    for name, value in engine._policies["writer"].weights.model.named_parameters():
        assert torch.equal(value, base[name]) == (".writer." not in name), name
    engine.close()


def test_policies_asked_at_once_are_served_by_their_own_weights(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model", **TWO)
    learn(engine, "writer")
    learn(engine, "rewriter", times=3)
    both = sampled(engine, "writer", "rewriter")
    for policy, completions in zip(("writer", "rewriter"), both, strict=True):
        engine.export(tmp_path / policy, policy)
        exact = PeftModel.from_pretrained(plain_model(tmp_path / "model"), tmp_path / policy)
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            expected = plain_logprobs(exact, prompt, completion.token_ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
        assert sampled(engine, policy)[0] == completions  # who else is served changes nothing
    engine.close()


def test_policies_are_kept_and_restored_each_with_its_optimiser(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model", **TWO)
    learn(engine, "writer")
    learn(engine, "rewriter", times=1)
    engine.save(tmp_path / "checkpoint")
    learn(engine, "writer")
    learn(engine, "rewriter")
    expected = {name: adapter(engine, name) for name in engine.policies}
    engine.close()
    assert json.loads((tmp_path / "checkpoint/rewriter/state.json").read_text())["version"] == 1

    restored = tiny_engine(tmp_path / "model", **TWO)
    restored.load(tmp_path / "checkpoint")
    assert (restored.version("writer"), restored.version("rewriter")) == (2, 1)
    learn(restored, "writer")
    learn(restored, "rewriter")
    for name in restored.policies:
        for key, value in adapter(restored, name).items():
            assert torch.equal(value, expected[name][key]), key
    restored.close()


def test_a_checkpoint_without_a_policy_says_which_it_has(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model", policies=("writer",), lora_rank=4)
    engine.save(tmp_path / "checkpoint")
    engine.close()
    other = tiny_engine(tmp_path / "model", **TWO)
    with pytest.raises(InvalidInput, match="no policy 'rewriter', but writer"):
        other.load(tmp_path / "checkpoint")
    with pytest.raises(NotFound, match="writer, rewriter"):
        sampled(other, "checker")
    other.close()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"policies": ()}, "one name or several"),
        ({"policies": ("a", "a"), "lora_rank": 2}, "one name or several"),
        ({"policies": ("a", "b")}, "lora_rank"),
        ({"policies": ("a/b",)}, "letters, digits"),
    ],
)
def test_policies_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        tiny_engine(tmp_path / "model", **settings)
