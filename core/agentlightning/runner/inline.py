"""Running attempts inside the worker's own process: async agents together in one loop, sync ones in threads.

For platforms without fork, and for agents that start fast and never hang: a sync agent that does cannot be
ended, only given up, and the attempts share one interpreter and its environment.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

from agentlightning import context
from agentlightning.context import ActiveRollout, attempt_base_url, use_rollout
from agentlightning.runner.agent import Agent, Outcome, call, context_of, load, rewards_of, takes_context
from agentlightning.runner.child import FLUSH_S, as_coroutine, failed
from agentlightning.tracing.process import TracerName, build_tracer
from agentlightning.types import AttemptStatus, Claim, Reward

logger = logging.getLogger(__name__)


class InlineExecutor:
    """Runs attempts in this process. `key` is the worker's, for the spans. Thread-safe."""

    def __init__(self, agent: Agent | str, server_url: str, key: str) -> None:
        self._agent = load(agent) if isinstance(agent, str) else agent
        takes_context(self._agent)
        self._server_url = server_url
        name = cast(TracerName, os.environ.get(context.ENV_TRACER, "otel"))
        self._tracer = build_tracer(server_url, key, name)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="agentlightning-agents", daemon=True
        )
        self._lock = threading.Lock()
        self._running: dict[str, Future[Any]] = {}

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    def close(self) -> None:
        """Stop the loop and send what is left of the spans."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self._tracer.shutdown()

    def run(self, claim: Claim, timeout_s: float) -> Outcome:
        """Run one attempt to its end, or until it is given up. Blocks."""
        emitted: list[Reward] = []
        base_url = attempt_base_url(self._server_url, claim.rollout.id, claim.attempt.id)
        active = ActiveRollout(
            rollout_id=claim.rollout.id,
            attempt_id=claim.attempt.id,
            base_url=base_url,
            api_key=claim.key,
            model=claim.model,
            tracer=self._tracer,
            report_reward=emitted.append,
        )
        ctx = context_of(claim, base_url)
        with use_rollout(active):
            result = self._start(claim.attempt.id, lambda: call(self._agent, ctx))
        outcome = self._await(claim.attempt.id, result, timeout_s, emitted)
        self._tracer.flush(FLUSH_S)
        return outcome

    def end(self, attempt_id: str) -> None:
        """Cancel what can be cancelled, give up the rest; its `run` returns soon after."""
        with self._lock:
            result = self._running.get(attempt_id)
        if result is not None:
            result.cancel()

    def _start(self, attempt_id: str, function: Callable[[], Any]) -> Future[Any]:
        """Start the agent in the current context, which holds its rollout."""
        if inspect.iscoroutinefunction(self._agent):
            result = asyncio.run_coroutine_threadsafe(function(), self._loop)
        else:
            result = Future[Any]()
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(self._call_sync, function, result), daemon=True).start()
        with self._lock:
            self._running[attempt_id] = result
        return result

    def _call_sync(self, function: Callable[[], Any], result: Future[Any]) -> None:
        try:
            value = function()
            if inspect.isawaitable(value):
                value = asyncio.run(as_coroutine(value))
        except BaseException as error:
            _settle(result, error=error)
        else:
            _settle(result, value=value)

    def _await(
        self, attempt_id: str, result: Future[Any], timeout_s: float, emitted: list[Reward]
    ) -> Outcome:
        try:
            rewards = rewards_of(result.result(timeout_s))
        except TimeoutError as error:
            if result.done() and not result.cancelled():  # the agent's own TimeoutError
                return failed(error, emitted)
            result.cancel()
            return Outcome(AttemptStatus.TIMED_OUT, f"the agent was given up after {timeout_s:g} s")
        except concurrent.futures.CancelledError:
            return Outcome(AttemptStatus.CANCELLED, "the attempt was cancelled", tuple(emitted))
        except BaseException as error:
            return failed(error, emitted)
        finally:
            with self._lock:
                self._running.pop(attempt_id, None)
        return Outcome(AttemptStatus.SUCCEEDED, None, (*emitted, *rewards))


def _settle(result: Future[Any], value: Any = None, error: BaseException | None = None) -> None:
    try:
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)
    except concurrent.futures.InvalidStateError:
        logger.warning("an agent that had been given up has ended after all; its result is ignored")
