# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.server.embedded_support import (
    ADVANTAGES,
    Piece,
    batch_of,
    difference,
    make_batch,
    old_logprobs,
    packed_gradient,
    plain_gradient,
    plain_logprobs,
    plain_model,
    sampled,
    some_tokens,
    tiny_engine,
    two_calls_each,
    unmerged,
)

from agentlightning.errors import NothingToLearn
from agentlightning_server.engines.embedded.losses import Clip, kl_penalty, policy_loss
from agentlightning_server.engines.embedded.packing import packed_tokens, plan
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.engines.embedded.updates import TrainingDiverged

CLIP = Clip(0.2, 0.28, 3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("pack_tokens", [1, 40, 10_000])
def test_packing_keeps_the_gradient_of_separate_rows(folder: Path, pack_tokens: int) -> None:
    batch = make_batch(two_calls_each(), ADVANTAGES, temperatures=[1.0, 0.7, 1.3] * 3)
    packed = packed_gradient(folder, batch, pack_tokens=pack_tokens)
    assert difference(packed, plain_gradient(folder, batch)) < 1e-4


def test_rows_without_a_common_prefix_keep_their_gradient(folder: Path) -> None:
    rows: list[list[Piece]] = [
        [(some_tokens(i, 10 + i), some_tokens(50 + i, 8), old_logprobs(i, range(8)))] for i in range(5)
    ]
    batch = make_batch(rows, ADVANTAGES[:5])
    assert difference(packed_gradient(folder, batch), plain_gradient(folder, batch)) < 1e-4


def test_merged_and_unmerged_calls_give_the_same_gradient(folder: Path) -> None:
    rows = two_calls_each()
    merged = make_batch(rows, ADVANTAGES)
    separate = make_batch(unmerged(rows), [a for a in ADVANTAGES for _ in range(2)])
    assert separate.rows == 2 * merged.rows
    assert difference(packed_gradient(folder, separate), packed_gradient(folder, merged)) < 1e-4


def test_every_distinct_prefix_is_computed_once() -> None:
    rows = two_calls_each()
    batch = make_batch(rows, ADVANTAGES)
    sequences = [[t for c, r, _ in pieces for t in (*c, *r)] for pieces in rows]
    distinct = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert packed_tokens(plan(batch, range(batch.rows), 10_000)) == len(distinct)


def test_chunks_stay_within_the_budget_and_the_stem_is_computed_once() -> None:
    batch = make_batch(two_calls_each(), ADVANTAGES)
    (stem,) = plan(batch, range(batch.rows), 45)
    assert len(stem.tokens) == 60
    assert len(stem.chunks) > 3
    assert all(len(chunk.tokens) <= 45 for chunk in stem.chunks)
    entries = np.sort(np.concatenate([chunk.entries for chunk in stem.chunks]))
    assert entries.tolist() == np.flatnonzero(batch.response_mask).tolist()


def test_the_loss_is_the_dual_clipped_surrogate() -> None:
    # advantage, ratio -> loss, worked by hand from the formula; the bounds are 0.8, 1.28 and 3
    cases = [
        (1.0, 1.0, -1.0),
        (1.0, 1.5, -1.28),
        (1.0, 0.5, -0.5),
        (-1.0, 1.5, 1.5),
        (-1.0, 0.5, 0.8),
        (-1.0, 7.0, 3.0),
        (-2.0, 7.0, 6.0),
    ]
    advantages, ratios, expected = (torch.tensor(column) for column in zip(*cases, strict=True))
    result = policy_loss(ratios.log(), torch.zeros(len(cases)), advantages, CLIP)
    torch.testing.assert_close(result.loss, expected)
    assert result.clipped.tolist() == [False, True, False, False, True, False, False]
    assert result.dual_clipped.tolist() == [False] * 5 + [True, True]


def test_kl_estimators_agree_with_the_exact_divergence() -> None:
    policy = torch.log(torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    reference = torch.log(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator, tolerance in (("k1", 1e-9), ("k2", 0.01), ("k3", 1e-9)):
        estimate = float((policy.exp() * kl_penalty(policy, reference, estimator)).sum())  # pyright: ignore[reportArgumentType]
        assert estimate == pytest.approx(exact, abs=tolerance)


def test_metrics_say_what_the_update_did(folder: Path) -> None:
    engine = tiny_engine(folder)
    prompts = [some_tokens(0, 70)] * 4
    batch = batch_of(prompts, sampled(engine, prompts, max_tokens=6), [1, -1, 0, 0])
    metrics = engine.update(batch)
    assert engine.version("policy") == 1
    assert metrics["logprob_gap"] < 1e-5  # the trainer agrees with the sampler
    assert metrics["clip_fraction"] == 0
    assert (metrics["rows"], metrics["skipped_rows"]) == (2, 2)  # no advantage, no gradient, no work
    assert metrics["row_tokens"] > metrics["packed_tokens"]
    assert metrics["grad_norm"] > 0
    assert metrics["seconds"] > 0
    engine.close()


def test_an_update_raises_what_was_rewarded_and_lowers_what_was_not(folder: Path) -> None:
    engine = tiny_engine(folder, learning_rate=1e-2)
    prompts = [some_tokens(0, 30)] * 2
    completions = sampled(engine, prompts)
    engine.update(batch_of(prompts, completions, [1.0, -1.0]))
    engine.export(folder.with_name("better"), "policy")
    model = plain_model(folder.with_name("better"))
    change = [
        np.sum(plain_logprobs(model, p, c.token_ids)) - np.sum(c.logprobs)
        for p, c in zip(prompts, completions, strict=True)
    ]
    assert change[0] > 0 > change[1]
    engine.close()


def test_a_batch_without_advantages_is_refused_and_changes_nothing(folder: Path) -> None:
    engine = tiny_engine(folder)
    batch = make_batch(two_calls_each(1, 2), [0.0, 0.0])
    with pytest.raises(NothingToLearn, match="2 rows"):
        engine.update(batch)
    assert engine.version("policy") == 0
    engine.close()


@pytest.mark.parametrize("column", ["old_logprobs", "weights", "advantages"])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(folder: Path, column: str) -> None:
    engine = tiny_engine(folder)
    good = make_batch(two_calls_each(), ADVANTAGES)
    values = getattr(good, column).copy()
    values[np.flatnonzero(good.response_mask)[-1]] = np.nan
    prompt = some_tokens(0, 40)
    before = sampled(engine, [prompt])[0]
    with pytest.raises(TrainingDiverged, match="update 1 is nan"):
        engine.update(replace(good, **{column: values}))
    after = sampled(engine, [prompt])[0]
    assert (after.policy_version, list(after.logprobs)) == (0, pytest.approx(list(before.logprobs)))
    engine.update(good)  # and the next update works
    assert engine.version("policy") == 1
    engine.close()


def test_the_learning_rate_warms_up(folder: Path) -> None:
    engine = tiny_engine(folder, learning_rate=1e-3, warmup_updates=3)
    batch = make_batch(two_calls_each(1, 3), ADVANTAGES[:3])
    rates = [engine.update(batch)["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    engine.close()


def test_an_adapter_learns_while_the_base_stays_and_is_served_merged(folder: Path) -> None:
    engine = tiny_engine(folder, lora_rank=4, learning_rate=1e-2)
    prompts = [some_tokens(0, 40)] * 4
    batch = batch_of(prompts, sampled(engine, prompts), [1.0, -1.0, 0.5, -0.5])
    base = {
        name: p.clone()
        for name, p in engine._policies["policy"].weights.model.named_parameters()
        if "lora" not in name
    }
    for _ in range(3):
        engine.update(batch)
    completions = sampled(engine, prompts)
    metrics = engine.update(batch_of(prompts, completions, [1.0, -1.0, 0.5, -0.5]))
    assert metrics["logprob_gap"] < 1e-5  # what is served is what is trained
    for name, value in base.items():
        assert torch.equal(value, dict(engine._policies["policy"].weights.model.named_parameters())[name])
    plain = plain_logprobs(plain_model(folder), prompts[0], completions[0].token_ids)
    assert np.abs(np.array(plain) - np.array(completions[0].logprobs)).max() > 1e-3  # and it did learn
    engine.close()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_kl_penalty_holds_the_policy_near_the_base(folder: Path, lora_rank: int) -> None:
    distances: list[float] = []
    for coefficient in (1e-9, 10.0):
        engine = tiny_engine(
            folder, lora_rank=lora_rank, learning_rate=1e-2, kl_coefficient=coefficient, warmup_updates=2
        )
        prompts = [some_tokens(0, 30)] * 4
        batch = batch_of(prompts, sampled(engine, prompts), [1.0, -1.0, 0.5, -0.5])
        for _ in range(6):
            metrics = engine.update(batch)
        distances.append(metrics["kl_reference"])  # pyright: ignore[reportPossiblyUnboundVariable]
        engine.close()
    assert 0 <= distances[1] < 0.5 * distances[0]
