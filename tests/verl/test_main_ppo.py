"""VeRL's own trainer and vLLM, really run on this CPU, with a LangChain agent outside of them.

One run of three steps, looked at from all sides. It takes minutes: `make test-verl`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentlightning.bridge import LearningSettings, deciding_attempt
from agentlightning.learning.air import AIR, apply_air
from agentlightning.reading import read_episode
from agentlightning.types import Episode, Mode, Transition
from agentlightning_server.store import RolloutFilter, Store
from agentlightning_server.verl.rows import make_rows

pytest.importorskip("vllm", reason="needs the environment of make verl-env")
pytest.importorskip("verl", reason="needs the environment of make verl-env")
torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from tests.verl.runs import Ended, prepare, train  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]
STEPS, BATCH, GROUP = 3, 4, 4
HARD_LIMIT_S = 1500  # 3 minutes on 2 idle cores; CI machines are not idle


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("verl")
    prepare(folder)
    options = ("--steps", str(STEPS), "--checkpoint-every", "1", "--val", str(folder / "val.jsonl"))
    return train(folder, *options, timeout_s=HARD_LIMIT_S)


def episodes(run: Ended, mode: Mode = Mode.TRAIN) -> Iterator[tuple[int, Episode]]:
    """(step from 1, episode) of every rollout, as it stands in the store."""
    with Store(run.folder / "run" / "store.db") as store:
        for rollout in store.rollouts(RolloutFilter(mode=mode, limit=1000)):
            attempt = deciding_attempt(store.attempts(rollout.id))
            assert attempt is not None
            episode = read_episode(rollout, attempt, store.spans(rollout.id))
            yield int(rollout.group_id.split(".")[-2]), apply_air(episode, AIR())


def transitions(run: Ended, step: int) -> list[Transition]:
    return [t for at, episode in episodes(run) if at == step for t in episode.transitions]


def test_all_steps_were_done_by_an_agent_outside(run: Ended) -> None:
    assert run.result["steps"] == STEPS
    assert [step["episodes"] for step in run.steps] == [BATCH * GROUP] * STEPS
    assert [step["tool_calls"] for step in run.steps] == [1.0] * STEPS, "every episode called its tool"
    assert [len(episode.transitions) for _, episode in episodes(run)] == [2] * (STEPS * BATCH * GROUP)
    assert not any(step["problems"] for step in run.steps)


def test_every_transition_was_sampled_by_the_newest_weights(run: Ended) -> None:
    for step in range(1, STEPS + 1):
        assert {t.policy_version for t in transitions(run, step)} == {step - 1}
    assert [step["version"] for step in run.steps] == [1, 2, 3]


def test_verl_read_the_rows_that_the_store_has(run: Ended) -> None:
    """VeRL writes down what it trained on, as text: prompts, responses and scores, row by row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(run.folder / "model"))

    def text(ids: Any) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    for step in range(1, STEPS + 1):
        lines = (run.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        read = Counter((r["input"], r["output"], round(r["score"], 4)) for r in rows if r["uid"][:3] != "pad")
        made = make_rows([episode for at, episode in episodes(run) if at == step], LearningSettings())
        assert len(made) == BATCH * GROUP, "both calls of an episode are one row"
        stored = Counter(
            (text(r.prompt_ids), text(r.response_ids), round(float(r.rewards.sum()), 4)) for r in made
        )
        assert read == stored


def test_vllm_and_the_actor_agree(run: Ended) -> None:
    for step in run.steps:
        assert step["update"]["training/rollout_actor_probs_pearson_corr"] > 0.99
        assert step["update"]["actor/grad_norm"] > 0
        assert step["mixed_groups"] > 0


def logprobs(model: Any, transition: Transition) -> np.ndarray:
    """Of the response, by transformers."""
    ids = np.concatenate([transition.prompt_ids, transition.response_ids])
    with torch.no_grad():
        scores = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float().log_softmax(-1)
    first = len(transition.prompt_ids)
    return np.array([float(scores[first + i - 1, token]) for i, token in enumerate(transition.response_ids)])


def test_vllm_served_the_weights_that_verl_had_saved(run: Ended) -> None:
    """Log-probabilities as recorded, computed again by transformers from the checkpoint of the version."""
    folders = [run.folder / "model"]
    folders += [
        run.folder / "run" / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"
        for step in range(1, STEPS)
    ]
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        for folder in folders
    ]
    for step in range(1, STEPS + 1):
        for transition in transitions(run, step)[:6]:
            own = logprobs(models[step - 1], transition)
            np.testing.assert_allclose(transition.logprobs, own, atol=2e-3)
            if step > 1:
                stale = logprobs(models[step - 2], transition)
                assert np.abs(transition.logprobs - stale).max() > 1e-2, "these are other weights"


def test_held_out_tasks_were_evaluated_before_and_after(run: Ended) -> None:
    result = run.result
    assert result["before"]["held_out"] == result["after"]["held_out"] == 2
    assert {at for at, _ in episodes(run, Mode.VAL)} == {0, STEPS}


def test_the_checkpoint_holds_an_ordinary_model_folder_too(run: Ended) -> None:
    checkpoint = Path(run.result["checkpoint"])
    assert checkpoint.name == f"global_step_{STEPS}"
    assert (checkpoint / "actor" / "huggingface" / "config.json").exists()
