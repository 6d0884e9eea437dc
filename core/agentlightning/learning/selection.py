"""Which transitions train: by agent name or node path, by policy, by predicate. The rest stay as context.

Selection never changes an episode's rewards; it only removes transitions, so a checker's or a frozen agent's
tokens carry no gradient. Selectors are ordinary predicates: `select_all` joins several, as `and` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from agentlightning.references import load_function
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


def select_policies(*patterns: str) -> Selector:
    """Transitions that a policy of one of these names sampled; glob patterns, case-sensitively."""

    def selector(transition: Transition) -> bool:
        return any(fnmatchcase(transition.policy, pattern) for pattern in patterns)

    return selector


def select_all(*selectors: Selector) -> Selector:
    """Transitions that every one of the selectors accepts."""
    return lambda transition: all(selector(transition) for selector in selectors)


def selector_named(reference: str) -> Selector:
    """A predicate of the user's by name, MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises InvalidInput when there is no such function; what the function itself raises passes through.
    """
    return load_function(reference, "selector")
