"""The actor between VeRL and our server: takes VeRL's prompts, gives back rows, and says how far it is.

It lives in Ray, started by the driver before VeRL is, so that both find it by name: VeRL's trainer hands it
prompts and its vLLM client (`manager`), the driver fetches that client for the gateway and asks how it goes.
Invariant: what goes wrong here reaches VeRL at its next call and the driver at its next look, never nobody.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentlightning.client import LightningClient
from agentlightning.errors import AgentLightningError, NothingToLearn
from agentlightning.types import Mode
from agentlightning_server.verl.collecting import Collector, Plan, Prompt, Tally

POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands. Times are of the actor's clock."""

    tallies: Sequence[Tally]
    open: int
    """Rollouts under way."""
    idle_s: float
    """Seconds since VeRL asked for something or a rollout ended."""
    error: str | None = None


class Bridge:
    """Runs as a Ray actor whose methods are called from several threads."""

    def __init__(self, url: str, key: str, plan: Plan, *, own_advantages: bool) -> None:
        self._service = LightningClient(url, key)
        self._plan = plan
        self._own_advantages = own_advantages
        self._client: Any = None
        self._collector: Collector | None = None
        self._lock = threading.Lock()
        self._active = time.monotonic()
        self._error: AgentLightningError | None = None

    def attach(self, llm_client: Any) -> None:
        """VeRL is up: its client of vLLM, for the gateway; its queue is there to be filled."""
        from agentlightning_server.verl.transfer import TransferQueueSink

        sink = TransferQueueSink(own_advantages=self._own_advantages)
        with self._lock:
            self._client = llm_client
            self._collector = Collector(self._service, self._plan, sink)
        threading.Thread(target=self._collect, name="agentlightning-collect", daemon=True).start()

    def llm_client(self) -> Any:
        """VeRL's client of vLLM; None before there is one."""
        return self._client

    def submit(self, prompts: Sequence[Prompt], mode: Mode, step: int, group_size: int) -> None:
        """Have rollouts run. Raises what went wrong earlier, and NothingToLearn after too many flat steps."""
        with self._lock:
            if self._error is not None:
                raise self._error
            assert self._collector is not None, "attach first"
            flat = self._collector.flat_steps
            if mode is Mode.TRAIN and flat >= self._plan.max_flat_steps:
                raise NothingToLearn(
                    f"in {flat} steps in a row all rollouts of each group earned the same: there is "
                    "no gradient. Choose tasks of middling difficulty, enlarge the group, or reward progress"
                )
            self._collector.submit(prompts, mode=mode, step=step, group_size=group_size)
            self._active = time.monotonic()

    def status(self) -> Status:
        """How far the run is."""
        collector = self._collector
        return Status(
            tallies=[] if collector is None else collector.tallies,
            open=0 if collector is None else collector.open,
            idle_s=time.monotonic() - self._active,
            error=None if self._error is None else str(self._error),
        )

    def _collect(self) -> None:
        assert self._collector is not None
        while self._error is None:
            before = self._collector.open
            try:
                with self._lock:
                    self._collector.poll(0.0)
            except AgentLightningError as error:
                self._error = error
            except Exception as error:  # whatever it is, VeRL must not wait for rows for ever
                self._error = AgentLightningError(f"collecting rollouts failed: {error!r}")
            if self._collector.open != before:
                self._active = time.monotonic()
            time.sleep(POLL_S)
