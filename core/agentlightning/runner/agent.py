"""The agent as the runner sees it: a function, what it is called with, and what may come back.

    fn(task_input)  or  fn(task_input, ctx),  sync or async  ->  None | float | dict[str, float]

A returned number is the reward of the attempt, a dict gives several by name; `emit_reward` adds more.
Not here: where the function runs (`child`, `inline`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from agentlightning.errors import InvalidInput, InvalidReward
from agentlightning.references import load_function
from agentlightning.rewards import checked_reward
from agentlightning.types import Attempt, AttemptStatus, Claim, Reward, Rollout
from agentlightning.wire import Reader, reward_from_json, reward_to_json

Agent: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class RolloutContext:
    """What an agent function may want to know about its attempt."""

    base_url: str
    """OpenAI-compatible API of this attempt: calls made there are recorded for it."""
    api_key: str = field(repr=False)
    """The attempt's own key; it stops working when the attempt ends."""
    model: str
    """Name of the policy to ask for."""
    rollout: Rollout
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    status: AttemptStatus
    error: str | None = None
    rewards: tuple[Reward, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the way from the child process."""
        return {
            "status": str(self.status),
            "error": self.error,
            "rewards": [reward_to_json(reward) for reward in self.rewards],
        }

    @classmethod
    def from_json(cls, body: object) -> Outcome:
        """Raises InvalidInput."""
        read = Reader(body, "outcome")
        rewards = tuple(reward_from_json(item) for item in read.items("rewards"))
        return cls(read.member("status", AttemptStatus), read.optional_text("error"), rewards)


def context_of(claim: Claim, base_url: str) -> RolloutContext:
    """What the agent of this claim is given."""
    return RolloutContext(base_url, claim.key, claim.model, claim.rollout, claim.attempt)


def call(agent: Agent, context: RolloutContext) -> Any:
    """Call the function with what it takes; the result of an async one is to be awaited."""
    task = context.rollout.task
    task_input = None if task is None else task.input
    return agent(task_input, context) if takes_context(agent) else agent(task_input)


def takes_context(agent: Agent) -> bool:
    """Whether the function wants the RolloutContext. Raises InvalidInput when it cannot be called."""
    try:
        parameters = inspect.signature(agent).parameters.values()
    except (TypeError, ValueError):
        return False
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    if not positional or len(needed) > 2:
        raise InvalidInput(
            f"{name_of(agent)} cannot be called by the runner: "
            "write it as fn(task_input) or fn(task_input, ctx)"
        )
    return len(needed) == 2 or (len(positional) > 1 and positional[1].name in ("ctx", "context"))


def rewards_of(result: object) -> tuple[Reward, ...]:
    """The rewards in a return value. Raises InvalidReward for what is none."""
    if result is None:
        return ()
    if isinstance(result, Mapping):
        named = cast(Mapping[object, object], result)
        return tuple(_returned(value, name) for name, value in named.items())
    return (_returned(result, "reward"),)


def _returned(value: object, name: object) -> Reward:
    try:
        return checked_reward(value, name)
    except InvalidReward as error:
        raise InvalidReward(
            f"the agent function returned a reward that cannot be used ({error}): "
            "return a finite number, a dict of names to finite numbers, or None"
        ) from None


# --- finding it ----------------------------------------------------------------------------------


def name_of(agent: Agent) -> str:
    """The function's name for messages."""
    return str(getattr(agent, "__qualname__", None) or type(agent).__qualname__)


def reference_of(agent: Agent | str) -> str:
    """ "MODULE:NAME" or "FILE.py:NAME", by which another process finds the function.

    Raises InvalidInput for a function that no other process can find, such as a lambda.
    """
    if isinstance(agent, str):
        return agent
    module, name = getattr(agent, "__module__", None), getattr(agent, "__qualname__", "")
    if not module or not name or "<" in name:
        raise InvalidInput(
            f"{name or agent!r} cannot be found by the processes that run attempts: "
            'define it at the top level of a module, or use isolation="inline"'
        )
    return f"{_main_reference() if module == '__main__' else module}:{name}"


def _main_reference() -> str:
    main = sys.modules["__main__"]
    if main.__spec__ is not None:  # started as python -m NAME
        return main.__spec__.name
    file = getattr(main, "__file__", None)
    if file is None:
        raise InvalidInput(
            "functions of an interactive session cannot be found by the processes that run attempts: "
            'put the agent into a module, or use isolation="inline"'
        )
    return str(Path(file).resolve())


def load(reference: str) -> Agent:
    """The function that a reference names. Raises InvalidInput; errors of the module itself pass through."""
    agent = load_function(reference, "agent")
    takes_context(agent)
    return agent
