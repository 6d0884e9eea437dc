"""LightningRL's algorithm layer: intermediate rewards, selection, credit, advantages, batches.

Pure functions over episodes; no torch, no server. In order:
`air` -> `selection` -> `credit` -> `advantages` -> `batching`.
"""

from agentlightning.learning.advantages import (
    Estimator,
    StepGroups,
    advantages_of,
    group_advantages,
    step_advantages,
)
from agentlightning.learning.air import AIR, Rule, apply_air, default_rules, rule_named
from agentlightning.learning.batching import Normalise, build_batch, merge_transitions
from agentlightning.learning.credit import (
    CREDIT,
    Credit,
    air_weighted,
    credit_named,
    discounted,
    identical,
    per_agent,
)
from agentlightning.learning.selection import (
    Selector,
    select,
    select_agents,
    select_all,
    select_policies,
    selector_named,
)

__all__ = [
    "AIR",
    "CREDIT",
    "Credit",
    "Estimator",
    "Normalise",
    "Rule",
    "Selector",
    "StepGroups",
    "advantages_of",
    "air_weighted",
    "apply_air",
    "build_batch",
    "credit_named",
    "default_rules",
    "discounted",
    "group_advantages",
    "identical",
    "merge_transitions",
    "per_agent",
    "rule_named",
    "select",
    "select_agents",
    "select_all",
    "select_policies",
    "selector_named",
    "step_advantages",
]
