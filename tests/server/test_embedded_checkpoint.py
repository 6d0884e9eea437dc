# pyright: reportUnknownMemberType=false, reportPrivateUsage=false
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.server.embedded_support import (
    batch_of,
    plain_logprobs,
    plain_model,
    sampled,
    some_tokens,
    tiny_engine,
)
from transformers import AutoTokenizer

from agentlightning.errors import InvalidInput, NotFound
from agentlightning_server.engines.embedded import EmbeddedEngine, checkpoint
from agentlightning_server.engines.embedded.tiny import make_tiny_model

PROMPTS = [some_tokens(0, 40)] * 4
ADVANTAGES = [1.0, -1.0, 0.5, -0.5]


def learn(engine: EmbeddedEngine) -> None:
    """One update on what the engine itself samples, without seeds."""
    engine.update(batch_of(PROMPTS, sampled(engine, PROMPTS, seed=None), ADVANTAGES))


def trained(engine: EmbeddedEngine) -> dict[str, torch.Tensor]:
    return {
        name: value.clone() for name, value in engine._policies["policy"].weights.trainable_state().items()
    }


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_restored_engine_goes_on_bitwise_as_if_never_stopped(tmp_path: Path, lora_rank: int) -> None:
    settings = {"lora_rank": lora_rank, "learning_rate": 1e-3, "warmup_updates": 4}
    engine = tiny_engine(tmp_path / "model", **settings)
    for _ in range(3):
        learn(engine)
    engine.save(tmp_path / "checkpoint")
    for _ in range(2):
        learn(engine)
    expected = trained(engine)
    engine.close()

    restored = tiny_engine(tmp_path / "model", **settings)
    restored.load(tmp_path / "checkpoint")
    assert restored.version("policy") == 3
    for _ in range(2):
        learn(restored)
    assert restored.version("policy") == 5
    for name, value in trained(restored).items():
        assert torch.equal(value, expected[name]), name
    restored.close()


def test_loading_serves_the_loaded_weights_and_not_cached_keys_of_others(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model", learning_rate=1e-2)
    before = sampled(engine, PROMPTS[:1])[0]
    engine.save(tmp_path / "start")
    learn(engine)
    assert sampled(engine, PROMPTS[:1])[0].logprobs != before.logprobs
    engine.load(tmp_path / "start")
    again = sampled(engine, PROMPTS[:1])[0]
    np.testing.assert_allclose(again.logprobs, before.logprobs, atol=1e-6)
    assert again.policy_version == 0
    engine.close()


def test_a_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model")
    for _ in range(2):
        learn(engine)
        engine.save(tmp_path / "checkpoint")
    assert checkpoint.load(tmp_path / "checkpoint", "policy")[0].version == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "model"]
    engine.close()


def test_a_write_that_fails_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    def works(folder: Path) -> None:
        (folder / "a").write_text("whole")

    def fails(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError("disk full")

    checkpoint.write_folder(tmp_path / "kept", works)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_folder(tmp_path / "kept", fails)
    assert (tmp_path / "kept" / "a").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model")
    with pytest.raises(NotFound, match="no checkpoint"):
        engine.load(tmp_path / "nowhere")
    engine.save(tmp_path / "full")
    engine.close()
    adapter = tiny_engine(tmp_path / "model", lora_rank=2)
    with pytest.raises(InvalidInput, match="lora_rank 0 and this engine 2"):
        adapter.load(tmp_path / "full")
    adapter.close()
    other = tiny_engine(make_tiny_model(tmp_path / "other", seed=1))
    with pytest.raises(InvalidInput, match="model"):
        other.load(tmp_path / "full")
    other.close()


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, how: str) -> None:
    state = checkpoint.EngineState(1, 1, 1, "model", 0, 0)
    (tmp_path / "c").mkdir()
    checkpoint.write(tmp_path / "c" / "policy", state, {"w": torch.zeros(8)}, {"step": torch.ones(1)})
    file = tmp_path / "c" / "policy" / name
    file.unlink() if how == "missing" else file.write_bytes(file.read_bytes()[:20])
    with pytest.raises((InvalidInput, NotFound), match=r"the checkpoint in .*/c is damaged|no checkpoint in"):
        checkpoint.load(tmp_path / "c", "policy")


def test_full_weights_are_exported_as_an_ordinary_model_folder(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model", learning_rate=1e-2)
    learn(engine)
    completion = sampled(engine, PROMPTS[:1])[0]
    engine.export(tmp_path / "export", "policy")
    engine.close()
    expected = plain_logprobs(plain_model(tmp_path / "export"), PROMPTS[0], completion.token_ids)
    np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").eos_token == "<|im_end|>"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
def test_an_adapter_is_exported_as_an_adapter_folder(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path / "model", learning_rate=1e-2, lora_rank=4)
    for _ in range(2):
        learn(engine)
    completion = sampled(engine, PROMPTS[:1])[0]
    engine.export(tmp_path / "adapter", "policy")
    engine.close()
    adapted = PeftModel.from_pretrained(plain_model(tmp_path / "model"), tmp_path / "adapter")
    expected = plain_logprobs(adapted, PROMPTS[0], completion.token_ids)
    np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
