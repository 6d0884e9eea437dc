"""Where VeRL asks for rollouts: `actor_rollout_ref.rollout.agent.agent_loop_manager_class`.

VeRL's own manager runs agent loops inside Ray. This one hands prompts to the bridge and returns at once; the
agents run where they live, and the bridge puts what they did into VeRL's queue.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
from __future__ import annotations

import json
from typing import Any

import ray
from verl.utils.ray_utils import auto_await

from agentlightning.types import Mode, Task
from agentlightning_server.verl.collecting import Prompt
from agentlightning_server.verl.names import BRIDGE_ACTOR


class RolloutManager:
    """Takes the place of VeRL's AgentLoopManager."""

    def __init__(self, config: Any, llm_client: Any, *_: Any, **__: Any) -> None:
        self._rollout = config.actor_rollout_ref.rollout
        self._bridge = ray.get_actor(BRIDGE_ACTOR)
        ray.get(self._bridge.attach.remote(llm_client))

    @classmethod
    @auto_await
    async def create(cls, *args: Any, **kwargs: Any) -> RolloutManager:
        """As VeRL makes it."""
        return cls(*args, **kwargs)

    def generate_sequences(self, prompts: Any) -> None:
        """Have rollouts of these prompts run. Raises what stopped earlier ones."""
        validate = "validate" in prompts and bool(prompts["validate"])
        size = int(self._rollout.val_kwargs.n if validate else self._rollout.n)
        columns = (list(prompts["uid"]), list(prompts["index"]), list(prompts["task"]))
        asked = [Prompt(str(key), int(place), _task(text)) for key, place, text in zip(*columns, strict=True)]
        mode = Mode.VAL if validate else Mode.TRAIN
        ray.get(self._bridge.submit.remote(asked, mode, _step(prompts["global_steps"]), size))


def _step(value: Any) -> int:
    """One number, or one for each prompt, all the same."""
    return int(value) if isinstance(value, int | str) else int(next(iter(value)))


def _task(text: Any) -> Task:
    return Task(**json.loads(str(text)))
