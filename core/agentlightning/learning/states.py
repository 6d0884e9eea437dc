"""What counts as the same state, for comparing calls of different episodes with each other.

A state is any hashable made from a transition alone. It should leave out what the policy itself wrote, or no
two sampled episodes would share one after their first call.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from itertools import takewhile

from agentlightning.types import Message, Transition

_IDENTITY = frozenset({"tool_call_id", "id"})


def observation(transition: Transition) -> Hashable:
    """Who is asked and what is new to it: agent, node path, and the messages since the assistant's last one.

    For the first call that is the whole prompt, for a call after a tool the tool's result. Ids of tool calls
    are left out. Two episodes that reached the same result by different ways share the state, as GiGPO's
    anchor states do (arXiv:2505.10978, section 4.2).
    """
    new = list(takewhile(lambda message: message.get("role") != "assistant", reversed(transition.messages)))
    return (transition.agent_name, transition.node_path, _text(new))


def history(transition: Transition) -> Hashable:
    """The exact prompt: calls share it only where everything before them was the same."""
    return (transition.agent_name, transition.node_path, transition.prompt_ids.tobytes())


STATES = {"observation": observation, "history": history}


def _text(messages: Sequence[Message]) -> str:
    kept = [{key: value for key, value in message.items() if key not in _IDENTITY} for message in messages]
    return json.dumps(kept, sort_keys=True, ensure_ascii=False)
