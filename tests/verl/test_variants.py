"""VeRL's own algorithms and modes through the same path, two steps each: `make test-verl-variants`.

Each takes some minutes, most of them to start; `-k critic` picks one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

pytest.importorskip("vllm", reason="needs the environment of make verl-env")
pytest.importorskip("verl", reason="needs the environment of make verl-env")

from tests.verl.runs import prepare, train

pytestmark = [pytest.mark.verl, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]

VARIANTS: Final[Mapping[str, Any]] = {
    "kl": {"actor_rollout_ref": {"actor": {"use_kl_loss": True, "kl_loss_coef": 0.01}}},
    "critic": {"algorithm": {"adv_estimator": "gae"}},
    "rloo": {"algorithm": {"adv_estimator": "rloo"}},
    "reinforce++": {"algorithm": {"adv_estimator": "reinforce_plus_plus"}},
    "tis": {"algorithm": {"rollout_correction": {"rollout_is": "token", "rollout_is_threshold": 2.0}}},
    "lora": {"actor_rollout_ref": {"model": {"lora_rank": 8}}},
    "colocate_async": {"trainer": {"v1": {"trainer_mode": "colocate_async"}}},
}
EXPECTED: Final = {
    "kl": "actor/kl_loss",
    "critic": "critic/vf_loss",
    "tis": "rollout_corr/rollout_is_mean",
}
"""A number that VeRL logs only where the variant is at work."""


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variant(name: str, tmp_path: Path) -> None:
    if name == "critic":
        pytest.importorskip("trl", reason="VeRL makes a critic of a causal model by trl")
    prepare(tmp_path, VARIANTS[name])
    run = train(tmp_path, "--steps", "2", "--checkpoint-every", "2", timeout_s=1700)
    assert run.result["steps"] == 2
    for step in run.steps:
        update = step["update"]
        assert math.isfinite(update["actor/pg_loss"])
        assert update["actor/grad_norm"] > 0
        assert update["training/rollout_actor_probs_pearson_corr"] > 0.99
        if name in EXPECTED:
            assert math.isfinite(update[EXPECTED[name]])
