"""One update of one or several policies from the same episodes, each from its own calls.

A policy that has nothing to learn stays as it is, and the others do not wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.errors import NothingToLearn
from agentlightning.types import Batch, Episode
from agentlightning_server.engines.base import Engine


def make_batches(
    episodes: Sequence[Episode], learning: LearningSettings, policies: Sequence[str]
) -> tuple[dict[str, Batch], Counter[str]]:
    """A batch for each policy that has one, and why the others have none.

    Raises NothingToLearn when no policy has one.
    """
    batches: dict[str, Batch] = {}
    without: Counter[str] = Counter()
    problems: list[NothingToLearn] = []
    for policy in policies:
        try:
            batches[policy] = make_batch(episodes, replace(learning, policy=policy))
        except NothingToLearn as problem:
            problems.append(problem)
            without[f"policy {policy} learns nothing: {problem}"] += 1
    if not batches:
        raise problems[0]
    return batches, without


def update_policies(
    engine: Engine, batches: Mapping[str, Batch], policies: Sequence[str]
) -> dict[str, float]:
    """Update each policy that has something to learn, and return the metrics; none where no policy has.

    With several `policies`, each name begins with the policy's and a slash.
    """
    metrics: dict[str, float] = {}
    for policy, batch in batches.items():
        prefix = f"{policy}/" if len(policies) > 1 else ""
        with suppress(NothingToLearn):  # all earned the same
            metrics |= {f"{prefix}{name}": value for name, value in engine.update(batch).items()}
    return metrics
