"""What a store costs as it grows: time of a claim and of a read, and space for each episode.

Times are CPU seconds of this process, medians; the database is SQLite as a server opens it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.support.stores import plain_span, queued

from agentlightning import semconv
from agentlightning.types import AttemptStatus, Span
from agentlightning_server.store import RolloutFilter, Store
from agentlightning_server.store.maintenance import size_on_disk

SMALL, LARGE = 1_000, 100_000  # rollouts in the store
SAMPLES = 200
EPISODES = 200
TURNS = 10
TURN_CHARACTERS = 600  # of a message; an answer and what the agent says next
TURN_TOKENS = 300


def run() -> dict[str, float]:
    """Microseconds by number of rollouts, and MiB for 1,000 episodes."""
    return {**_latency(), **_space()}


def _latency() -> dict[str, float]:
    found: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Store(Path(folder) / "store.db", durability="normal") as store,
    ):
        for size in (SMALL, LARGE):
            have = sum(store.counts().values())
            ids = [f"r{number:06}" for number in range(have, size)]
            for start in range(0, len(ids), 5000):
                store.enqueue([queued(rollout_id) for rollout_id in ids[start : start + 5000]])
            middle = f"r{size // 2:06}"
            found[f"claim_us_at_{size}"] = _median_us(lambda: store.claim("w", 1))
            found[f"read_us_at_{size}"] = _median_us(lambda middle=middle: store.rollout(middle))
            found[f"page_us_at_{size}"] = _median_us(
                lambda middle=middle: store.rollouts(RolloutFilter(after=middle))
            )
    for name in ("claim", "read", "page"):
        found[f"{name}_large_over_small"] = found[f"{name}_us_at_{LARGE}"] / found[f"{name}_us_at_{SMALL}"]
    return found


def _median_us(work: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(SAMPLES):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return 1e6 * statistics.median(times)


def _space() -> dict[str, float]:
    sent = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        Store(Path(folder) / "store.db", durability="normal") as store,
    ):
        for number in range(EPISODES):
            spans = _episode(f"e{number}", number)
            sent += sum(
                len(value)
                for span in spans
                for value in span.attributes.values()
                if isinstance(value, (str, bytes))
            )
            store.enqueue([queued(f"e{number}")])
            (claim,) = store.claim("w")
            store.add_spans(spans)
            store.finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED)
        store.vacuum()
        stored = size_on_disk(store)
    scale = 1000 / EPISODES / (1 << 20)
    return {
        "mib_for_1000_episodes_of_10_turns": stored * scale,
        "mib_sent_for_them": sent * scale,
        "stored_over_sent": stored / sent,
    }


def _episode(rollout_id: str, seed: int) -> list[Span]:
    """Calls as the gateway records them: each prompt repeats the one before, as messages and as ids."""
    rng = np.random.default_rng(seed)
    messages: list[dict[str, str]] = [{"role": "system", "content": "You are a careful agent. " * 40}]
    ids = rng.integers(0, 50_000, 400).tolist()
    spans: list[Span] = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": rng.bytes(TURN_CHARACTERS // 2).hex()})
        prompt = list(ids)
        answer = rng.integers(0, 50_000, TURN_TOKENS // 2).tolist()
        attributes = {
            semconv.INPUT_MESSAGES: json.dumps(messages),
            semconv.PROMPT_IDS: np.array(prompt, "<i4").tobytes(),
            semconv.RESPONSE_IDS: np.array(answer, "<i4").tobytes(),
            semconv.RESPONSE_LOGPROBS: np.zeros(len(answer), "<f4").tobytes(),
        }
        identity = seed * TURNS + turn
        spans.append(plain_span(identity, rollout_id, attempt_id=f"{rollout_id}-1", attributes=attributes))
        messages.append({"role": "assistant", "content": rng.bytes(TURN_CHARACTERS // 2).hex()})
        ids += [*answer, *rng.integers(0, 50_000, TURN_TOKENS // 2).tolist()]
    return spans


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
