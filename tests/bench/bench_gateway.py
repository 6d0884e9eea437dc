"""What the gateway adds to a request over calling the engine directly, and what reading spans costs.

The engine is a real one around a tiny model, so that its own time is short beside the gateway's; figures are
medians over requests made one after the other on one connection.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from tests.support.serving import serving, tiny_engine
from tests.support.spans import adapter_call, attempt, gateway_call, reward, rollout, tool, user

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.reading import read_episode
from agentlightning.types import Episode
from agentlightning_server.engines.base import Sampling

REQUESTS = 300
MESSAGES: list[Any] = [{"role": "user", "content": "hello " * 40}]
CALLS_PER_EPISODE = 5
EPISODES = 200


def run() -> dict[str, float]:
    """Milliseconds a request, and transitions a second."""
    with tempfile.TemporaryDirectory() as folder:
        direct_ms, through_ms = asyncio.run(_requests(Path(folder)))
    return {
        "engine_direct_ms_p50": direct_ms,
        "gateway_ms_p50": through_ms,
        "gateway_overhead_ms_p50": through_ms - direct_ms,
        **_reading(),
    }


async def _requests(folder: Path) -> tuple[float, float]:
    engine = tiny_engine(folder, gather_s=0.0)
    with serving(engine, folder) as server:
        prompt = server.gateway.prompts.build(MESSAGES, [], "bench").token_ids
        body = {"model": "policy", "messages": MESSAGES, "max_tokens": 1, "seed": 1}
        sampling = Sampling(max_tokens=1, seed=1)
        direct: list[float] = []
        through: list[float] = []
        url = f"{server.url}/rollouts/bench/attempts/bench-1/v1/chat/completions"
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {server.key}"}) as client:
            for _ in range(REQUESTS):
                began = time.perf_counter()
                await engine.generate(prompt, sampling, "policy")
                direct.append(time.perf_counter() - began)
                began = time.perf_counter()
                (await client.post(url, json=body)).raise_for_status()
                through.append(time.perf_counter() - began)
    return statistics.median(direct) * 1e3, statistics.median(through) * 1e3


def _reading() -> dict[str, float]:
    """From stored spans to transitions, and from episodes to a merged batch."""
    spans = [_episode_spans(i) for i in range(EPISODES)]
    began = time.perf_counter()
    episodes: list[Episode] = []
    for i, own in enumerate(spans):
        episodes.append(read_episode(rollout(group_id=str(i // 8)), attempt(), own))
    read_s = time.perf_counter() - began
    began = time.perf_counter()
    batch = make_batch(episodes, LearningSettings())
    batch_s = time.perf_counter() - began
    assert batch.transitions == EPISODES * CALLS_PER_EPISODE
    return {
        "transitions_read_per_s": batch.transitions / read_s,
        "transitions_batched_per_s": batch.transitions / batch_s,
        "tokens_unmerged_over_merged": batch.unmerged_tokens / batch.tokens,
    }


def _episode_spans(number: int) -> list[Any]:
    history = list(range(400))
    spans: list[Any] = []
    for turn in range(CALLS_PER_EPISODE):
        asked = adapter_call(100 * turn, agent="agent", messages=[user("hello " * 50)])
        response = list(range(1000 * turn, 1000 * turn + 40))
        sampled = gateway_call(100 * turn + 1, history, response, parent_id=asked.span_id)
        spans += [asked, sampled, tool(100 * turn + 50)]
        history = [*history, *response, *range(30)]
    return [*spans, reward(10_000, float(number % 2))]
