"""LightningRL's algorithm layer: intermediate rewards, selection, credit, advantages, batches.

Pure functions over episodes; no torch, no server. In order:
`air` -> `selection` -> `credit` -> `advantages` -> `batching`.
"""

from agentlightning.learning.advantages import Estimator, group_advantages
from agentlightning.learning.air import AIR, Rule, apply_air, default_rules
from agentlightning.learning.batching import Normalise, build_batch, merge_transitions
from agentlightning.learning.credit import CREDIT, Credit, discounted, identical
from agentlightning.learning.selection import Selector, select, select_agents

__all__ = [
    "AIR",
    "CREDIT",
    "Credit",
    "Estimator",
    "Normalise",
    "Rule",
    "Selector",
    "apply_air",
    "build_batch",
    "default_rules",
    "discounted",
    "group_advantages",
    "identical",
    "merge_transitions",
    "select",
    "select_agents",
]
