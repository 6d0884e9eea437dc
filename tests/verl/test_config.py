"""Configuration files: what is read, what wins over what, and what VeRL is started with in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from agentlightning.bridge import LearningSettings
from agentlightning.errors import InvalidInput
from agentlightning.learning import Estimator
from agentlightning_server.training.trainer import TrainSettings
from agentlightning_server.verl.config import VerlFile, compose, environment, placed_for, read_file
from agentlightning_server.verl.rows import Placed

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "calcx_math" / "verl").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("default")  # VeRL's own
CPU: dict[str, Any] = {"agentlightning": {"cpu": True}}


def written(folder: Path, content: Any) -> VerlFile:
    path = folder / "verl.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_file(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "must map"),
        ("{", "cannot read"),
        ({"agentlightning": {"gpu": True}}, "agentlightning has no gpu"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        written(tmp_path, content)


def test_settings_are_looked_up_by_verls_names(tmp_path: Path) -> None:
    file = written(tmp_path, {"data": {"train_batch_size": 5}})
    assert file.get("data.train_batch_size") == 5
    assert file.get("data.seed", 1) == 1
    assert file.get("trainer.v1.trainer_mode") is None


def test_the_environment_names_our_modules_and_takes_the_files(tmp_path: Path) -> None:
    file = written(tmp_path, {"agentlightning": {"env": {"VLLM_LOGGING_LEVEL": "INFO"}}})
    given = environment(file, tmp_path / "log")
    assert given["VERL_USE_EXTERNAL_MODULES"] == "agentlightning_server.verl.estimator"
    assert given["VLLM_LOGGING_LEVEL"] == "INFO"
    assert "VERL_PLATFORM" not in given
    assert environment(written(tmp_path, CPU), tmp_path)["VERL_PLATFORM"] == "cpu"


# --- with VeRL -----------------------------------------------------------------------------------


def composed(file: VerlFile, tmp_path: Path, **training: Any) -> Any:
    pytest.importorskip("torchdata", reason="needs the environment of make verl-env")
    settings = TrainSettings(run_id="r", output=tmp_path, **training)
    nowhere = tmp_path / "tasks"
    return compose(file, settings, model="m", train_tasks=nowhere, val_tasks=nowhere, validates=False)


def test_the_run_decides_sizes_and_the_file_the_rest(tmp_path: Path) -> None:
    own = {"actor_rollout_ref": {"rollout": {"n": 99, "temperature": 0.7}}}
    config = composed(written(tmp_path, {**CPU, **own}), tmp_path, group_size=4, tasks_per_step=2, steps=7)
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.n, rollout.temperature, config.trainer.total_training_steps) == (4, 0.7, 7)
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == 2
    assert config.algorithm.adv_estimator == "agentlightning_episode"
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "agentlightning"
    assert rollout.logprobs_mode == "processed_logprobs", "so they are of the temperature"
    assert placed_for(config) is Placed.RETURN


def test_learning_settings_choose_the_estimator(tmp_path: Path) -> None:
    learning = LearningSettings(estimator=Estimator.REINFORCE_PP)
    assert composed(written(tmp_path, CPU), tmp_path, learning=learning).algorithm.adv_estimator == (
        "agentlightning_episode_whitened"
    )


def test_verls_own_estimators_keep_verls_own_loss(tmp_path: Path) -> None:
    config = composed(written(tmp_path, {**CPU, "algorithm": {"adv_estimator": "rloo"}}), tmp_path)
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "vanilla"
    assert placed_for(config) is Placed.RETURN
    config.algorithm.adv_estimator = "gae"
    assert placed_for(config) is Placed.EARNED


def test_a_key_that_verl_does_not_know_is_an_error(tmp_path: Path) -> None:
    file = written(tmp_path, {**CPU, "trainer": {"n_gpu_per_node": 8}})
    with pytest.raises(InvalidInput, match=r"no setting trainer\.n_gpu_per_node"):
        composed(file, tmp_path)


def test_what_verl_refuses_and_what_would_be_ignored_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="use_kl_loss"):
        composed(written(tmp_path, {**CPU, "algorithm": {"use_kl_in_reward": True}}), tmp_path)
    too_many = {"actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 64}}}
    with pytest.raises(InvalidInput, match="VeRL refuses"):
        composed(written(tmp_path, {**CPU, **too_many}), tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_of_the_examples_are_what_verl_takes(path: Path, tmp_path: Path) -> None:
    file = read_file(path)
    size, group = file.get("data.train_batch_size"), file.get("actor_rollout_ref.rollout.n")
    config = composed(file, tmp_path, tasks_per_step=size, group_size=group)
    assert config.actor_rollout_ref.rollout.max_model_len == (
        config.data.max_prompt_length + config.data.max_response_length
    )
