"""A flow of several agents, some of which learn: LangGraph, runner, server and engine are the real ones."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.e2e.test_loop import WitnessEngine
from tests.server.embedded_support import difference, packed_gradient
from tests.support.serving import serving, tiny_engine

from agentlightning.bridge import LearningSettings, TrainerBridge, make_batch
from agentlightning.learning import select_agents, selector_named
from agentlightning.reading import read_episode
from agentlightning.types import Batch, Episode, Task, Transition
from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded.engine import EmbeddedEngine
from agentlightning_server.engines.embedded.settings import EmbeddedSettings
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.settings import Settings
from agentlightning_server.store import Store
from agentlightning_server.training.local import RunnerSettings, local_runner, local_server
from agentlightning_server.training.reporting import StepRecord
from agentlightning_server.training.trainer import Trainer, TrainSettings

AGENTS = "tests.e2e.flow_agents"
LEARNERS = select_agents("writer", "rewriter")
GRADIENT = 1e-4  # by how much two ways to the same gradient may differ, relative to its length

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call


def task(**more: Any) -> Task:
    return Task("t", {"question": "Say something.", **more})


def adapters(folder: Path, *policies: str) -> EmbeddedSettings:
    """These policies, each an adapter on one tiny model."""
    model = str(make_tiny_model(folder / "tiny"))
    return EmbeddedSettings(
        model, policies=policies, lora_rank=4, learning_rate=1e-2, context_length=1024, threads=1
    )


def settings(folder: Path, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "run_id": "run",
        "output": folder / "run",
        "steps": 2,
        "tasks_per_step": 1,
        "group_size": 4,
        "checkpoint_every": 1,
        **changes,
    }
    return TrainSettings(**values)


def said_by(engine: EmbeddedEngine, policy: str) -> tuple[list[int], list[float]]:
    """What a policy says to a fixed prompt, with logprobs."""
    prompt = engine.tokenizer.encode("Good? A draft.", add_special_tokens=False)
    sampled: Completion = asyncio.run(engine.generate(prompt, Sampling(max_tokens=12, seed=1), policy))
    return list(sampled.token_ids), list(sampled.logprobs)


# --- one policy, of which two agents learn -------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Episode]]:
    """Episodes of the flow in which all agents ask for one policy, and the folder of its model."""
    folder = tmp_path_factory.mktemp("flow")
    with serving(tiny_engine(folder), folder) as server:
        runner = RunnerSettings(f"{AGENTS}:one_policy", concurrency=4)
        with local_runner(server.url, server.key, runner, folder / "runner.log"):
            collected = TrainerBridge(server.store, "run").collect(
                [task()], step=0, group_size=4, timeout_s=120
            )
    assert not collected.problems
    return folder / "tiny", list(collected.episodes)


def without_advantage(batch: Batch, episodes: Sequence[Episode], agent: str) -> Batch:
    """A batch of all calls in which an agent's have none, and the others weigh as they do without it."""
    calls = [t for episode in episodes for t in episode.transitions]
    its = np.isin(batch.transition_index, [i for i, t in enumerate(calls) if t.agent_name == agent])
    weights = batch.weights.copy()
    for e in range(len(episodes)):
        others = np.isin(batch.transition_index, np.flatnonzero(batch.transition_episode == e)) & ~its
        weights[others] = 1 / (len(episodes) * others.sum())
    return replace(batch, advantages=np.where(its, 0, batch.advantages).astype(np.float32), weights=weights)


def test_an_agent_that_is_not_selected_carries_no_gradient(recorded: tuple[Path, list[Episode]]) -> None:
    model, episodes = recorded
    assert [[t.agent_name for t in e.transitions] for e in episodes] == [
        ["writer", "checker", "rewriter"]
    ] * 4
    selected = make_batch(episodes, LearningSettings(select=LEARNERS))
    everything = make_batch(episodes, LearningSettings())
    gradient = packed_gradient(model, selected)
    assert gradient.norm() > 1e-3
    silent = packed_gradient(model, without_advantage(everything, episodes, "checker"))
    assert difference(gradient, silent) < GRADIENT
    assert difference(gradient, packed_gradient(model, everything)) > 0.05, "selected, the checker matters"


def test_what_an_agent_that_is_not_selected_said_matters_only_to_those_who_read_it(
    recorded: tuple[Path, list[Episode]],
) -> None:
    model, episodes = recorded

    def other_words(call: Transition) -> Transition:
        if call.agent_name != "checker":
            return call
        words = np.full(5, 70, np.int32)
        return replace(call, response_ids=words, logprobs=np.full(5, -0.1, np.float32))

    changed = [replace(e, transitions=[other_words(t) for t in e.transitions]) for e in episodes]
    learning = LearningSettings(select=selector_named("tests.e2e.test_flow:learns"))
    before, after = (packed_gradient(model, make_batch(e, learning)) for e in (episodes, changed))
    assert difference(before, after) < GRADIENT
    everything = LearningSettings()
    before, after = (packed_gradient(model, make_batch(e, everything)) for e in (episodes, changed))
    assert difference(before, after) > 0.05


def learns(call: Transition) -> bool:
    """The predicate that the test above names."""
    return call.agent_name in ("writer", "rewriter")


# --- a policy each, trained from the same episodes -----------------------------------------------


class NotingEngine(WitnessEngine):
    """Also notes the batches it learns from."""

    def __init__(self, settings: EmbeddedSettings) -> None:
        super().__init__(settings)
        self.batches: list[Batch] = []

    def update(self, batch: Batch) -> Any:
        self.batches.append(batch)
        return super().update(batch)


def test_two_policies_learn_from_the_same_episodes_and_the_checker_stays(tmp_path: Path) -> None:
    policies = ("writer", "rewriter", "checker")
    engine = NotingEngine(adapters(tmp_path, *policies))
    before = {name: said_by(engine, name) for name in policies}
    runner = RunnerSettings(f"{AGENTS}:a_policy_each", concurrency=4)
    training = settings(tmp_path, policies=("writer", "rewriter"))
    with (
        serving(engine, tmp_path) as server,
        local_runner(server.url, server.key, runner, tmp_path / "runner.log"),
    ):
        result = Trainer(engine, server.store, training).run([task()])
        episodes = episodes_of(server.store)
        after = {name: said_by(engine, name) for name in policies}
    assert [step.versions for step in result.steps] == [
        {"writer": 1, "rewriter": 1},
        {"writer": 2, "rewriter": 2},
    ]
    assert after["checker"] == before["checker"], "bitwise as before training"
    assert after["writer"] != before["writer"]
    assert after["rewriter"] != before["rewriter"]
    assert [batch.policy for batch in engine.batches] == ["writer", "rewriter"] * 2
    for batch in engine.batches:
        version = int(batch.policy_versions[0])
        assert responses_of(batch) == sampled_by(batch.policy, version, episodes)

    resumed = NotingEngine(adapters(tmp_path, *policies))
    with (
        serving(resumed, tmp_path) as server,
        local_runner(server.url, server.key, runner, tmp_path / "runner.log"),
    ):
        Trainer(resumed, server.store, training).run([task()])  # all steps are done
        assert {name: said_by(resumed, name) for name in policies} == after, "bitwise as it was left"
        result = Trainer(resumed, server.store, replace(training, steps=3)).run([task()])
    assert [step.versions["writer"] for step in result.steps] == [1, 2, 3]
    assert result.checkpoint is not None
    assert versions_in(result.checkpoint) == {"writer": 3, "rewriter": 3, "checker": 0}


def episodes_of(store: Store) -> list[Episode]:
    """The episodes of all finished rollouts."""
    return [
        read_episode(rollout, store.attempts(rollout.id)[-1], store.spans(rollout.id))
        for rollout in store.rollouts()
    ]


def responses_of(batch: Batch) -> list[list[int]]:
    """The responses in a batch."""
    return sorted(batch.token_ids[batch.transition_index == i].tolist() for i in range(batch.transitions))


def sampled_by(policy: str, version: int, episodes: Sequence[Episode]) -> list[list[int]]:
    """The responses that one version of a policy gave in these episodes."""
    calls = [t for e in episodes for t in e.transitions]
    own = [t for t in calls if (t.policy, t.policy_version) == (policy, version)]
    return sorted(t.response_ids.tolist() for t in own)


def versions_in(checkpoint: Path) -> dict[str, int]:
    """Version by policy."""
    states = {folder.name: json.loads((folder / "state.json").read_text()) for folder in checkpoint.iterdir()}
    return {name: state["version"] for name, state in states.items()}


# --- a checker that another server answers -------------------------------------------------------


def test_a_checker_that_an_upstream_answers_is_context_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upstream is a second server of ours, with a store of its own."""
    folder = tmp_path / "hosted"
    hosted_engine = WitnessEngine(EmbeddedSettings(str(make_tiny_model(folder / "tiny")), threads=1))
    with serving(hosted_engine, folder) as hosted:
        monkeypatch.setenv("HOSTED_KEY", hosted.key)
        table = {"hosted": {"url": f"{hosted.url}/v1", "model": "policy", "key_env": "HOSTED_KEY"}}
        (tmp_path / "upstreams.json").write_text(json.dumps(table))
        step, episodes = _trained_with(tmp_path, [task(checked_by="hosted", stream=s) for s in (False, True)])
        answers = [hosted.gateway.prompts.decode(said.token_ids) for _, said in hosted_engine.sampled]
    assert step.versions == {"writer": 1, "rewriter": 1}
    assert not step.problems
    assert len(episodes) == 8
    for episode in episodes:
        assert [(c.agent_name, c.policy) for c in episode.calls] == [
            ("writer", "writer"),
            ("checker", None),
            ("rewriter", "rewriter"),
        ]
        assert [t.agent_name for t in episode.transitions] == ["writer", "rewriter"]
        assert not episode.untrainable
    checked = [c for e in episodes for c in e.calls if c.agent_name == "checker"]
    assert all(c.gateway_span_id not in (None, c.span_id) for c in checked), "adapter and gateway met"
    assert sorted(str(c.output["content"]) for c in checked if c.output) == sorted(answers)


def _trained_with(folder: Path, tasks: Sequence[Task]) -> tuple[StepRecord, list[Episode]]:
    """One step on these tasks with the folder's upstreams, and its episodes."""
    tasks = [replace(t, id=str(i)) for i, t in enumerate(tasks)]
    upstreams = folder / "upstreams.json"
    served = Settings(port=0, database=folder / "store.db", upstreams=upstreams)
    with local_server(EmbeddedEngine(adapters(folder, "writer", "rewriter")), served) as server:
        runner = RunnerSettings(f"{AGENTS}:a_policy_each", concurrency=4)
        with local_runner(server.url, server.key, runner, folder / "runner.log"):
            training = settings(folder, steps=1, tasks_per_step=2, policies=("writer", "rewriter"))
            (step,) = Trainer(server.engine, server.store, training).run(tasks).steps
        return step, episodes_of(server.store)
