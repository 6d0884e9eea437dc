# pyright: reportPrivateUsage=false
from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.server.embedded_support import (
    batch_of,
    plain_logprobs,
    plain_model,
    sample_all,
    sampled,
    some_tokens,
    tiny_engine,
)

from agentlightning.errors import InvalidInput, NotFound, PromptTooLong, Unavailable
from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded import EmbeddedEngine
from agentlightning_server.engines.embedded.sampling import Ask, draw

TOLERANCE = 2e-5  # natural log; float32 sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "model"


@pytest.fixture
def engine(folder: Path) -> Iterator[EmbeddedEngine]:
    engine = tiny_engine(folder)
    yield engine
    engine.close()


@pytest.fixture
def plain(folder: Path, engine: EmbeddedEngine) -> Any:
    del engine  # it makes the folder
    return plain_model(folder)


def check_logprobs(plain: Any, prompts: Sequence[list[int]], completions: Sequence[Completion]) -> None:
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = plain_logprobs(plain, prompt, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


def mixed_prompts() -> list[list[int]]:
    """Two families with long shared prefixes, repeated prompts, and loners."""
    first, second = some_tokens(1, 120), some_tokens(2, 90)
    prompts = [first + some_tokens(10 + i, 5 + 3 * i) for i in range(6)]
    prompts += [second + some_tokens(30 + i, 4) for i in range(4)]
    prompts += [some_tokens(50 + i, 7 * (i + 1)) for i in range(3)]
    return prompts + prompts[:6] + prompts[:3]


def test_logprobs_of_a_shared_batch_are_those_of_each_prompt_alone(
    engine: EmbeddedEngine, plain: Any
) -> None:
    prompts = mixed_prompts()
    check_logprobs(plain, prompts, sampled(engine, prompts))
    assert engine.stats.rows < engine.stats.drawn  # equal prompts did share rows
    assert engine.stats.computed < sum(map(len, prompts)) / 2  # and prefixes


def test_prompts_that_continue_a_completion_compute_only_what_is_new(
    engine: EmbeddedEngine, plain: Any
) -> None:
    prompts = mixed_prompts()[:8]
    first = sampled(engine, prompts)
    longer = [[*p, *c.token_ids, 5, 6, 7] for p, c in zip(prompts, first, strict=True)]
    before = engine.stats.computed
    check_logprobs(plain, longer, sampled(engine, longer))
    # of each prompt only the last sampled token and two of the three new ones; the last new one is decoded
    assert engine.stats.computed - before == 3 * len(longer)


def test_requests_that_join_while_others_decode_are_exact(engine: EmbeddedEngine, plain: Any) -> None:
    prompts = mixed_prompts()

    async def staggered() -> list[Completion]:
        tasks: list[asyncio.Task[Completion]] = []
        for i, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=5 + 3 * i, seed=i)
            tasks.append(asyncio.create_task(engine.generate(prompt, sampling, "policy")))
            await asyncio.sleep(0.002)
        return await asyncio.gather(*tasks)

    check_logprobs(plain, prompts, asyncio.run(staggered()))


def test_a_late_request_catches_up_with_one_that_draws_the_same(engine: EmbeddedEngine, plain: Any) -> None:
    prompt = some_tokens(1, 80)
    early = sampled(engine, [prompt], seed=3, max_tokens=30)[0]
    steps = engine.stats.steps
    late = sampled(engine, [prompt], seed=3, max_tokens=30)[0]
    assert late == early
    assert (engine.stats.recalled, engine.stats.steps) == (30, steps)  # nothing was computed for it
    longer = sampled(engine, [prompt], seed=3, max_tokens=40)[0]
    assert list(longer.token_ids[:30]) == list(early.token_ids)
    assert engine.stats.steps == steps + 10
    other = sampled(engine, [prompt], seed=4, max_tokens=30)[0]
    check_logprobs(plain, [prompt, prompt], [longer, other])


def test_a_late_request_shares_the_row_of_one_under_way(engine: EmbeddedEngine) -> None:
    prompt = some_tokens(1, 80)
    started = asyncio.Event()

    async def scenario() -> tuple[Completion, Completion]:
        loop = asyncio.get_running_loop()

        def some_are_drawn(tokens: Sequence[int]) -> bool:
            if len(tokens) == 20:
                loop.call_soon_threadsafe(started.set)
            return False

        sampling = Sampling(400, seed=3, should_stop=some_are_drawn)
        early = asyncio.create_task(engine.generate(prompt, sampling, "policy"))
        await started.wait()
        return await asyncio.gather(early, engine.generate(prompt, Sampling(400, seed=3), "policy"))

    early, late = asyncio.run(scenario())
    assert late == early
    assert engine.stats.recalled >= 20
    assert engine.stats.rows == len(early.token_ids)  # one row for both, all the way


def test_what_was_drawn_is_forgotten_when_the_weights_change(folder: Path) -> None:
    engine = tiny_engine(folder, learning_rate=1e-1)
    prompts = [some_tokens(i, 20) for i in range(2)]
    completions = sampled(engine, prompts)
    engine.update(batch_of(prompts, completions, [1.0, -1.0]))
    assert sampled(engine, prompts)[0].logprobs != completions[0].logprobs
    assert engine.stats.recalled == 0
    engine.close()


def test_little_memory_sets_requests_aside_and_loses_none(folder: Path) -> None:
    engine = tiny_engine(folder, context_length=128, cache_tokens=256, slots=8)
    prompts = [some_tokens(i, 20) for i in range(8)]
    completions = sampled(engine, prompts, max_tokens=70)
    check_logprobs(plain_model(folder), prompts, completions)
    assert engine.stats.parked > 0
    assert all(len(c.token_ids) == 70 or c.finish_reason == "stop" for c in completions)
    engine.close()


def test_a_seed_gives_the_same_tokens_alone_and_in_company(engine: EmbeddedEngine) -> None:
    prompt = some_tokens(1, 80)
    alone = sampled(engine, [prompt], seed=7)[0]
    company = [prompt, *mixed_prompts()]
    together = asyncio.run(sample_all(engine, company, seed=7))[0]
    assert list(together.token_ids) == list(alone.token_ids)
    assert list(sampled(engine, [prompt], seed=8)[0].token_ids) != list(alone.token_ids)


def test_a_seed_may_be_negative(engine: EmbeddedEngine) -> None:
    first, again = sampled(engine, [some_tokens(1, 20)] * 2, seed=-1)
    assert list(first.token_ids) == list(again.token_ids)


def test_without_seeds_equal_prompts_draw_differently(engine: EmbeddedEngine) -> None:
    completions = sampled(engine, [some_tokens(1, 20)] * 4, seed=None)
    assert len({tuple(c.token_ids) for c in completions}) == 4


def test_greedy_is_what_transformers_generates(engine: EmbeddedEngine, plain: Any) -> None:
    prompt = some_tokens(3, 40)
    expected = plain.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    completion = sampled(engine, [prompt], temperature=0.0, max_tokens=20)[0]
    assert list(completion.token_ids) == expected.tolist()
    np.testing.assert_allclose(
        completion.logprobs, plain_logprobs(plain, prompt, completion.token_ids), atol=TOLERANCE
    )


def test_logprobs_are_at_the_sampling_temperature_over_the_whole_vocabulary(
    engine: EmbeddedEngine, plain: Any
) -> None:
    prompt = some_tokens(4, 30)
    completion = sampled(engine, [prompt], temperature=0.6, top_p=0.8)[0]
    expected = plain_logprobs(plain, prompt, completion.token_ids, temperature=0.6)
    np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logits = torch.log(torch.tensor(probabilities, dtype=torch.float32))[None].repeat(1, 1)
    asks = [Ask(0, Sampling(1), uniform) for uniform in np.random.default_rng(0).random(4000).tolist()]
    counts = np.bincount([d.token for d in draw(logits, asks)], minlength=4)
    error = np.sqrt(probabilities * (1 - probabilities) / 4000)
    assert (np.abs(counts / 4000 - probabilities) < 4 * error).all()


def test_a_draw_knows_which_uniform_numbers_lead_to_it() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = np.random.default_rng(0).random(50).tolist()
    for uniform, drawn in zip(
        uniforms, draw(logits, [Ask(0, Sampling(1), u) for u in uniforms]), strict=True
    ):
        assert drawn.low <= uniform < drawn.high
        assert drawn.high - drawn.low == pytest.approx(np.exp(drawn.logprob), rel=1e-5)
        edges = [Ask(0, Sampling(1), u) for u in (drawn.low + 1e-12, drawn.high - 1e-12, drawn.high + 1e-12)]
        tokens = [d.token for d in draw(logits, edges)]
        assert tokens[:2] == [drawn.token] * 2
        assert tokens[2] != drawn.token


def test_top_p_draws_only_from_the_nucleus() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    asks = [Ask(0, Sampling(1, top_p=0.7), (i + 0.5) / 200) for i in range(200)]
    assert {d.token for d in draw(logits, asks)} == {1, 3}


def test_draws_reach_every_block_of_a_large_vocabulary() -> None:
    logits = torch.full((1, 1000), -30.0)
    logits[0, [3, 255, 256, 999]] = 0.0
    asks = [Ask(0, Sampling(1), (i + 0.5) / 200) for i in range(200)]
    assert {d.token for d in draw(logits, asks)} == {3, 255, 256, 999}


def test_top_logprobs_are_the_most_likely_tokens_in_order(engine: EmbeddedEngine) -> None:
    with_tops, without = (sampled(engine, [some_tokens(5, 9)], top_logprobs=k)[0] for k in (3, 0))
    assert [len(top) for top in with_tops.top_logprobs] == [3] * len(with_tops.token_ids)
    for top in with_tops.top_logprobs:
        assert [lp for _, lp in top] == sorted((lp for _, lp in top), reverse=True)
    assert without.top_logprobs == ()


def test_should_stop_sees_every_token_and_ends_with_stop(engine: EmbeddedEngine) -> None:
    seen: list[int] = []

    def after_four(tokens: Sequence[int]) -> bool:
        seen.append(len(tokens))
        return len(tokens) == 4

    completion = sampled(engine, [some_tokens(6, 10)], should_stop=after_four, temperature=0.0)[0]
    assert (len(completion.token_ids), completion.finish_reason, seen) == (4, "stop", [1, 2, 3, 4])


def test_a_should_stop_that_raises_fails_its_own_request_only(engine: EmbeddedEngine) -> None:
    def broken(tokens: Sequence[int]) -> bool:
        raise ZeroDivisionError

    async def both() -> tuple[Completion | BaseException, ...]:
        bad = engine.generate(some_tokens(1, 9), Sampling(5, should_stop=broken), "policy")
        good = engine.generate(some_tokens(1, 9), Sampling(5), "policy")
        return await asyncio.gather(bad, good, return_exceptions=True)

    bad, good = asyncio.run(both())
    assert isinstance(bad, ZeroDivisionError)
    assert isinstance(good, Completion)


def test_a_completion_ends_at_the_context_limit(engine: EmbeddedEngine) -> None:
    prompt = some_tokens(7, engine.context_length - 3)
    completion = sampled(engine, [prompt], max_tokens=50)[0]
    assert len(completion.token_ids) <= 3


def test_prompts_that_cannot_be_served_say_why(engine: EmbeddedEngine) -> None:
    with pytest.raises(PromptTooLong, match=r"600 tokens .* 512 .* context_length"):
        sampled(engine, [some_tokens(1, 600)])
    with pytest.raises(InvalidInput, match="at least one token"):
        sampled(engine, [[]])
    with pytest.raises(InvalidInput, match="max_tokens"):
        sampled(engine, [[5]], max_tokens=0)
    with pytest.raises(NotFound, match="no policy 'other'"):
        asyncio.run(engine.generate([5], Sampling(1), "other"))


def test_cancelling_frees_the_slot_for_others(folder: Path) -> None:
    engine = tiny_engine(folder, slots=1)
    started = asyncio.Event()

    async def scenario() -> Completion:
        loop = asyncio.get_running_loop()

        def never(tokens: Sequence[int]) -> bool:
            loop.call_soon_threadsafe(started.set)
            return False

        endless = asyncio.create_task(
            engine.generate(some_tokens(1, 9), Sampling(400, should_stop=never), "policy")
        )
        await started.wait()
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        return await engine.generate(some_tokens(2, 9), Sampling(3), "policy")

    assert asyncio.run(scenario()).token_ids
    assert engine.stats.drawn < 300
    engine.close()


def test_a_full_queue_turns_requests_away_with_a_time_to_retry(folder: Path) -> None:
    engine = tiny_engine(folder, slots=1, queue_size=2)

    async def flood() -> list[Completion | BaseException]:
        calls = [engine.generate(some_tokens(i, 5), Sampling(30), "policy") for i in range(8)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(flood())
    refused = [r for r in results if isinstance(r, Unavailable)]
    assert refused
    assert all(r.retry_after_s > 0 for r in refused)
    assert len([r for r in results if isinstance(r, Completion)]) == 8 - len(refused)
    engine.close()


def test_an_error_while_computing_fails_who_was_under_way_and_nobody_later(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> torch.Tensor:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._policies["policy"].decoder, "_forward", out_of_memory)
        with pytest.raises(RuntimeError, match="not enough memory"):
            sampled(engine, mixed_prompts())
    assert len(sampled(engine, mixed_prompts())) == len(mixed_prompts())


def test_closing_ends_waiting_requests_and_refuses_new_ones(folder: Path) -> None:
    engine = tiny_engine(folder)

    async def scenario() -> BaseException | Completion:
        call = asyncio.create_task(engine.generate(some_tokens(1, 9), Sampling(500), "policy"))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
        return (await asyncio.gather(call, return_exceptions=True))[0]

    assert isinstance(asyncio.run(scenario()), Unavailable)
    with pytest.raises(Unavailable, match="closed"):
        sampled(engine, [[5]])


def test_an_update_waits_for_generations_and_every_completion_has_one_version(folder: Path) -> None:
    engine = tiny_engine(folder, learning_rate=1e-2, slots=4)
    prompts = [some_tokens(i, 20) for i in range(4)]
    batch = batch_of(prompts, sampled(engine, prompts), [1.0, -1.0, 1.0, -1.0])

    async def scenario() -> list[Completion]:
        early = [asyncio.create_task(engine.generate(p, Sampling(60, seed=1), "policy")) for p in prompts]
        await asyncio.sleep(0.02)
        update = asyncio.create_task(asyncio.to_thread(engine.update, batch))
        await asyncio.sleep(0.02)
        late = [asyncio.create_task(engine.generate(p, Sampling(60, seed=1), "policy")) for p in prompts]
        await update
        return await asyncio.gather(*early, *late)

    early_plain = plain_model(folder)
    completions = asyncio.run(scenario())
    assert [c.policy_version for c in completions] == [0] * 4 + [1] * 4
    check_logprobs(early_plain, prompts, completions[:4])
    with pytest.raises(AssertionError):
        check_logprobs(early_plain, prompts, completions[4:])
    engine.export(folder.with_name("updated"), "policy")
    check_logprobs(plain_model(folder.with_name("updated")), prompts, completions[4:])
    engine.close()
