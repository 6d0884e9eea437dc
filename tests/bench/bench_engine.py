"""The embedded engine against plain transformers `generate` and TRL's GRPOTrainer step, same model, same run.

The workload is that of a group-relative step of an agent with worked examples in its prompt: a few prompts
with a long common prefix, several completions of each. A second decoding workload has nothing in common, so
that what sharing prefixes gains can be told from what batching gains.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportMissingImports=false
from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from agentlightning.learning.advantages import group_advantages
from agentlightning.learning.batching import build_batch
from agentlightning.types import Batch, Episode, Transition
from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded import DEFAULT_MODEL, EmbeddedEngine, EmbeddedSettings
from agentlightning_server.engines.embedded.loading import load_model

PROMPTS = 2
GROUP = 8
SHARED_TOKENS = 440
OWN_TOKENS = 40
NEW_TOKENS = 32
LONERS = 16
LONER_TOKENS = 60
LEARNING_RATE = 1e-5


def run() -> dict[str, float | str]:
    """Tokens per second, and how many times faster than the others."""
    engine = EmbeddedEngine(EmbeddedSettings(model=DEFAULT_MODEL, learning_rate=LEARNING_RATE))
    plain: Any = load_model(DEFAULT_MODEL).model
    results: dict[str, float | str] = {"model": f"{DEFAULT_MODEL} ({engine.source})"}
    _warm_up(engine, plain)
    grouped, alone = _group_prompts(), [_tokens(100 + i, LONER_TOKENS) for i in range(LONERS)]
    completions: list[Completion] = []
    for name, prompts in (("group", grouped), ("unrelated", alone)):
        ours, sampled = _decode(engine, prompts)
        theirs = _plain_decode(plain, prompts)
        completions = completions or sampled
        results[f"decode_{name}_tokens_s"] = ours
        results[f"decode_{name}_over_transformers"] = ours / theirs
    batch = _batch(grouped, completions)
    start = time.perf_counter()
    metrics = engine.update(batch)
    seconds = time.perf_counter() - start
    engine.close()
    results["train_row_tokens_s"] = batch.tokens / seconds
    results["train_packed_over_row_tokens"] = metrics["packed_tokens"] / metrics["row_tokens"]
    trl = _trl_step(plain, grouped, completions)
    if isinstance(trl, float):
        results["train_over_trl"] = trl / seconds
    else:
        results["trl"] = trl
    return results


def _tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(count)]


def _group_prompts() -> list[list[int]]:
    shared = _tokens(0, SHARED_TOKENS)
    return [shared + _tokens(1 + i, OWN_TOKENS) for i in range(PROMPTS) for _ in range(GROUP)]


def _warm_up(engine: EmbeddedEngine, plain: Any) -> None:
    """First passes allocate and choose kernels."""
    prompts = [_tokens(90 + i, 8) for i in range(4)]
    _decode(engine, prompts)
    _plain_decode(plain, prompts)


def _decode(engine: EmbeddedEngine, prompts: Sequence[list[int]]) -> tuple[float, list[Completion]]:
    async def all_at_once() -> list[Completion]:
        sampling = [Sampling(NEW_TOKENS, seed=i) for i in range(len(prompts))]
        pairs = zip(prompts, sampling, strict=True)
        return await asyncio.gather(*(engine.generate(p, s, "policy") for p, s in pairs))

    start = time.perf_counter()
    completions = asyncio.run(all_at_once())
    seconds = time.perf_counter() - start
    return sum(len(c.token_ids) for c in completions) / seconds, completions


@torch.no_grad()
def _plain_decode(model: Any, prompts: Sequence[list[int]]) -> float:
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
    )
    return output[:, ids.shape[1] :].numel() / (time.perf_counter() - start)


def _batch(prompts: Sequence[list[int]], completions: Sequence[Completion]) -> Batch:
    """The completions as one-call episodes with made-up rewards."""
    episodes: list[Episode] = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        call = Transition(
            span_id=f"{i:016x}",
            prompt_ids=np.array(prompt, dtype=np.int32),
            response_ids=np.array(completion.token_ids, dtype=np.int32),
            logprobs=np.array(completion.logprobs, dtype=np.float32),
            messages=(),
            output=None,
            agent_name=None,
            policy="policy",
            policy_version=0,
        )
        episodes.append(Episode(str(i), str(i), str(i // GROUP), None, [call], _reward(i)))
    returns = [np.array([_reward(i)], dtype=np.float32) for i in range(len(episodes))]
    return build_batch(episodes, group_advantages(returns, [e.group_id for e in episodes]), policy="policy")


def _reward(row: int) -> float:
    return float(row % GROUP) / GROUP


class _StepTimer(TrainerCallback):
    """Seconds of the optimiser step, forward and backward passes included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._start


def _trl_step(model: Any, prompts: Sequence[list[int]], completions: Sequence[Completion]) -> float | str:
    """Seconds of one GRPOTrainer step on the same rows, handed over so that only training is timed."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            from datasets import Dataset
            from trl.trainer.grpo_config import GRPOConfig
            from trl.trainer.grpo_trainer import GRPOTrainer
        except ImportError:
            return "not installed: pip install -e .[bench]"

        def rollouts(asked: Sequence[Any], _: Any) -> dict[str, Any]:
            assert len(asked) == len(prompts)
            return {
                "prompt_ids": list(prompts),
                "completion_ids": [list(c.token_ids) for c in completions],
                "logprobs": [list(c.logprobs) for c in completions],
            }

        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=GROUP,
            gradient_accumulation_steps=PROMPTS,
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            learning_rate=LEARNING_RATE,
            max_steps=1,
            beta=0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        timer = _StepTimer()
        trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [_reward(i) for i in range(len(completions))],  # pyright: ignore
            args=config,
            train_dataset=Dataset.from_list([{"prompt": f"task {i}"} for i in range(PROMPTS)]),
            processing_class=load_model(DEFAULT_MODEL).tokenizer,
            rollout_func=rollouts,
            callbacks=[timer],
        )
        trainer.train()
        return timer.seconds
