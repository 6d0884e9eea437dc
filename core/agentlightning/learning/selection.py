"""Which transitions train: by agent name or node path, by policy, by predicate. The rest stay as context.

Selection never changes an episode's rewards; it only removes transitions, so a checker's or a frozen agent's
tokens carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from agentlightning.types import Episode, Transition

Selector: TypeAlias = "Callable[[Transition], bool]"


def select(episode: Episode, selector: Selector) -> Episode:
    """The episode with only the transitions that `selector` accepts."""
    return replace(episode, transitions=[t for t in episode.transitions if selector(t)])


def select_agents(*patterns: str) -> Selector:
    """Transitions whose agent name or node path matches one of the glob patterns, case-sensitively."""

    def selector(transition: Transition) -> bool:
        names = [name for name in (transition.agent_name, transition.node_path) if name is not None]
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return selector
