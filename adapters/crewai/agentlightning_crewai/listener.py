"""The adapter in CrewAI's own idiom: an event listener that one constructs, which is all.

What this is not: a user of the event bus. Its handlers run later, in other threads and unordered, and get the
messages and tools cut off at a depth of five; what is recorded comes from the calls themselves.
"""

from __future__ import annotations

from crewai.events import BaseEventListener
from crewai.events.event_bus import CrewAIEventsBus

from agentlightning_crewai import runs
from agentlightning_crewai.instrumentation import instrument


class LightningEventListener(BaseEventListener):
    """Records every crew, agent and flow of this process from its construction on."""

    def __init__(self) -> None:
        self._last_rollout_id: str | None = None
        super().__init__()

    @property
    def rollout_id(self) -> str | None:
        """The rollout of the last run that started, for a reward that comes later.

        For a crew that runs by itself it is the live rollout of the run's trace. None before the first run,
        and when nothing is recorded. With several runs at once, wrap each in `agentlightning.trace` instead.
        """
        return self._last_rollout_id

    def setup_listeners(self, crewai_event_bus: CrewAIEventsBus) -> None:  # noqa: ARG002 (see the module)
        instrument()
        runs.watch(self)

    def run_started(self, rollout_id: str) -> None:
        self._last_rollout_id = rollout_id
