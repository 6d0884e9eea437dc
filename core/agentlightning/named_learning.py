"""Learning settings in words: what a command line can say and the file of a run can hold.

`LearningSettings` holds functions; this holds their names, so that a run's settings can be written down with
it and read again by `agl rescore`. Whatever is left out has its default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from agentlightning.bridge import LearningSettings
from agentlightning.errors import InvalidInput
from agentlightning.learning import (
    AIR,
    Estimator,
    Normalise,
    Selector,
    StepGroups,
    credit_named,
    default_rules,
    rule_named,
    select_agents,
    select_all,
    selector_named,
)
from agentlightning.learning.air import BOUND


@dataclass(frozen=True, slots=True)
class NamedLearning:
    """How episodes become a batch. Functions of the user's are MODULE:FUNCTION or FILE.py:FUNCTION."""

    air: bool = True
    """Whether AIR's default rules give rewards."""
    air_rules: Sequence[str] = ()
    """Rules of the user's, which count without the default ones too."""
    air_bound: float = BOUND
    air_fine: float = 0.0
    """What a failed tool call costs by the default rules."""
    agents: Sequence[str] = ()
    """Names or node paths of the agents that learn, globs; none for all."""
    select: str | None = None
    """A predicate of transitions; with `agents`, of theirs."""
    credit: str = "identical"
    """A name in `CREDIT`, or a function."""
    estimator: Estimator = Estimator.GRPO
    by_agent: bool = False
    step_groups: float = 0.0
    """Weight of comparing calls made in the same state with each other (GiGPO); 0 for none."""
    normalise: Normalise | None = None

    def settings(self) -> LearningSettings:
        """With the functions that the names stand for. Raises InvalidInput where there is none."""
        return LearningSettings(
            air=self._air(),
            select=self._selector(),
            credit=credit_named(self.credit),
            estimator=self.estimator,
            by_agent=self.by_agent,
            steps=StepGroups(self.step_groups) if self.step_groups else None,
            normalise=self.normalise,
        )

    def _air(self) -> AIR | None:
        own = [rule_named(reference) for reference in self.air_rules]
        rules = [*(default_rules(fine=self.air_fine) if self.air else ()), *own]
        return AIR(rules, self.air_bound) if rules else None

    def _selector(self) -> Selector | None:
        selectors: list[Selector] = [select_agents(*self.agents)] if self.agents else []
        if self.select is not None:
            selectors.append(selector_named(self.select))
        return select_all(*selectors) if selectors else None

    def changed(self, given: Mapping[str, Any]) -> Self:
        """With other values for the settings that are named."""
        return replace(self, **given)

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold, by the names of the settings."""
        values = asdict(self)
        lists = {name: list(values[name]) for name in ("air_rules", "agents")}
        return {**values, **lists, "estimator": str(self.estimator), "normalise": self.normalise}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Those of the settings that `values` holds; other entries are left alone. Raises InvalidInput."""
        known = {name: values[name] for name in cls.names() if values.get(name) is not None}
        try:
            if "estimator" in known:
                known["estimator"] = Estimator(known["estimator"])
            if "normalise" in known:
                known["normalise"] = Normalise(known["normalise"])
        except ValueError as error:
            raise InvalidInput(f"the learning settings cannot be read: {error}") from error
        return cls(**known)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(field.name for field in fields(cls))
