"""Rewards from inside an agent: `emit_reward` wherever the agent, or the code around it, knows how it went.

What this is not: credit. How a reward reaches single calls is decided when episodes are made (`learning`).
Invariant: a number that cannot be learned from is refused at once, here; everything else about telemetry is
only logged.
"""

from __future__ import annotations

import time

from agentlightning import semconv
from agentlightning.context import current_rollout, open_span
from agentlightning.errors import InvalidReward
from agentlightning.tracing.guard import guarded, warn
from agentlightning.tracing.process import get_tracer
from agentlightning.types import AttributeValue, Reward
from agentlightning.wire import FLOAT32_MAX


def emit_reward(value: float, name: str = "reward", target: str | None = None) -> Reward:
    """Give a finite number to the running attempt, or to one call of it when `target` is that call's span id.

    Several names make several dimensions of the reward. Inside a rollout of a runner the reward is reported
    with the attempt; elsewhere it is a span of the open trace. Raises InvalidReward when the value is not a
    finite number, or the name or target is not usable.
    """
    reward = checked_reward(value, name, target)
    _send(reward)
    return reward


def checked_reward(value: object, name: object = "reward", target: object = None) -> Reward:
    """The reward, or InvalidReward. Takes NumPy's and torch's scalars too; refuses bool, NaN and infinity."""
    is_flag = type(value).__name__ in ("bool", "bool_")  # Python's and NumPy's
    if is_flag or isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise InvalidReward(f"A reward must be a number, not {value!r:.80}. Give e.g. 1.0 or 0.0.")
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidReward(f"A reward must be one number, not {value!r:.80}: {error}.") from None
    if not abs(number) <= FLOAT32_MAX:
        raise InvalidReward(
            f"A reward must be finite, not {number}. Decide what a failed measurement is worth."
        )
    if not isinstance(name, str) or not name:
        raise InvalidReward(f"A reward's name must be a non-empty text, not {name!r:.80}.")
    if target is not None and not _is_span_id(target):
        raise InvalidReward(f"A reward's target must be a span id of 16 hex digits, not {target!r:.80}.")
    return Reward(number, name, None if target is None else str(target), time.time_ns())


def _is_span_id(target: object) -> bool:
    return isinstance(target, str) and len(target) == 16 and all(c in "0123456789abcdef" for c in target)


@guarded
def _send(reward: Reward) -> None:
    active = current_rollout()
    if active is not None and active.report_reward is not None:
        active.report_reward(reward)
        return
    around = open_span()
    if active is None and around is None:
        warn(
            "The reward %r was emitted outside of any trace and is lost. Emit it inside the agent's run or "
            "inside `with agentlightning.trace(...)`, or send it by rollout id with the client.",
            reward.name,
        )
        return
    attributes: dict[str, AttributeValue] = {
        semconv.REWARD_VALUE: reward.value,
        semconv.REWARD_NAME: reward.name,
        semconv.REWARD_TARGET: reward.target,
    }
    span = get_tracer().start_span(
        f"reward {reward.name}",
        parent=around,
        attributes=attributes,
        start_ns=reward.time_ns,
        scope=semconv.SCOPE_REWARD,
    )
    span.end(end_ns=reward.time_ns)
