"""What the gateway adds to a request over calling the engine directly, and what reading spans costs.

The engine is a real one around a tiny model, so that its own time is short beside the gateway's; figures are
medians over requests made one after the other on one connection. The upstream is a scripted endpoint in a
process of its own, asked directly and through the gateway in turn.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tests.support.serving import serving, tiny_engine
from tests.support.spans import adapter_call, attempt, gateway_call, reward, rollout, tool, user

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.reading import read_episode
from agentlightning.types import Episode
from agentlightning_server.engines.base import Sampling
from agentlightning_server.settings import Settings
from agentlightning_server.training.local import local_server

REQUESTS = 300
MESSAGES: list[Any] = [{"role": "user", "content": "hello " * 40}]
CALLS_PER_EPISODE = 5
EPISODES = 200
_ENDPOINT = """
import threading
from tests.support.chat_endpoint import ChatEndpoint
with ChatEndpoint() as endpoint:
    print(endpoint.url, flush=True)
    threading.Event().wait()
"""


def run() -> dict[str, float]:
    """Milliseconds a request, and transitions a second."""
    with tempfile.TemporaryDirectory() as folder:
        direct_ms, through_ms = asyncio.run(_requests(Path(folder)))
    with tempfile.TemporaryDirectory() as folder, _endpoint() as url:
        upstream_ms, forwarded_ms = asyncio.run(_forwarded(Path(folder), url))
    return {
        "engine_direct_ms_p50": direct_ms,
        "gateway_ms_p50": through_ms,
        "gateway_overhead_ms_p50": through_ms - direct_ms,
        "upstream_overhead_ms_p50": forwarded_ms - upstream_ms,
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


async def _forwarded(folder: Path, upstream: str) -> tuple[float, float]:
    """Milliseconds of an upstream's answer, asked for directly and through the gateway."""
    table = folder / "upstreams.json"
    table.write_text(json.dumps({"hosted": {"url": upstream}}))
    settings = Settings(port=0, database=folder / "store.db", upstreams=table)
    body = {"model": "hosted", "messages": MESSAGES}
    times: dict[str, list[float]] = {}
    with local_server(tiny_engine(folder), settings) as server:
        own = f"{server.url}/rollouts/bench/attempts/bench-1/v1"
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {server.key}"}) as client:
            for _ in range(REQUESTS):
                for url in (upstream, own):
                    began = time.perf_counter()
                    (await client.post(f"{url}/chat/completions", json=body)).raise_for_status()
                    times.setdefault(url, []).append(time.perf_counter() - began)
    return statistics.median(times[upstream]) * 1e3, statistics.median(times[own]) * 1e3


@contextmanager
def _endpoint() -> Generator[str]:
    """A scripted endpoint in another process."""
    command = [sys.executable, "-c", _ENDPOINT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


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
