"""One attempt inside its own process: environment, rollout context, the agent, and its outcome on disk.

Runs in a process forked by `launcher_process`, as leader of its own session and process group. Not here: time
limits and the end of a hung agent, which come from outside. Invariant: whatever the agent does, short of
killing the process, an outcome is written, after its spans were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import random
import sys
import traceback
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from agentlightning import context
from agentlightning.context import ActiveRollout, attempt_base_url, set_process_rollout, use_rollout
from agentlightning.runner.agent import Agent, Outcome, RolloutContext, call, context_of, rewards_of
from agentlightning.tracing.process import set_tracer
from agentlightning.types import AttemptStatus, Claim, Reward

FLUSH_S = 5.0  # that the spans of an attempt may take to be sent after the agent is done


def run_attempt(agent: Agent, claim: Claim, server_url: str, outcome_path: Path) -> None:
    """Run the agent and write its Outcome as JSON to `outcome_path`."""
    base_url = attempt_base_url(server_url, claim.rollout.id, claim.attempt.id)
    _set_environment(claim, server_url, base_url)
    _reseed()
    set_tracer(None)  # whatever importing the agent configured was not for this attempt
    emitted: list[Reward] = []
    active = ActiveRollout(
        rollout_id=claim.rollout.id,
        attempt_id=claim.attempt.id,
        base_url=base_url,
        api_key=claim.key,
        model=claim.model,
        report_reward=emitted.append,
    )
    set_process_rollout(active)
    with use_rollout(active):
        outcome = run_to_outcome(agent, context_of(claim, base_url), emitted)
    tracer = set_tracer(None)
    if tracer is not None:  # the agent had something to record
        tracer.flush(FLUSH_S)
    _flush_application_spans()
    write_outcome(outcome_path, outcome)


def run_to_outcome(agent: Agent, ctx: RolloutContext, emitted: list[Reward]) -> Outcome:
    """Run the agent to its end, whatever that is. `emitted` collects rewards while it runs."""
    try:
        result = call(agent, ctx)
        if inspect.isawaitable(result):
            result = asyncio.run(as_coroutine(result))
        returned = rewards_of(result)
    except BaseException as error:  # sys.exit and Ctrl-C inside an agent end the attempt, not the runner
        return failed(error, emitted)
    return Outcome(AttemptStatus.SUCCEEDED, None, (*emitted, *returned))


async def as_coroutine(awaitable: Awaitable[Any]) -> Any:
    """What `asyncio.run` takes, of whatever can be awaited."""
    return await awaitable


def failed(error: BaseException, emitted: list[Reward]) -> Outcome:
    """The outcome of an agent that raised, with the part of the traceback that is the agent's."""
    frames = step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
            frames = step.tb_next
        step = step.tb_next
    if frames is None:  # ours, about what the agent returned: a sentence, no traceback
        return Outcome(AttemptStatus.FAILED, str(error), tuple(emitted))
    shown = traceback.format_exception(error.with_traceback(frames))
    return Outcome(AttemptStatus.FAILED, "".join(shown), tuple(emitted))


_OWN_FOLDER = str(Path(__file__).parent)


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Whole or not at all: the parent reads it as soon as this process is gone."""
    partial = path.with_suffix(".partial")
    # ASCII escapes also carry the lone surrogates that an agent's exception may hold.
    partial.write_text(json.dumps(outcome.to_json()))
    os.replace(partial, path)


def _set_environment(claim: Claim, server_url: str, base_url: str) -> None:
    os.environ.update(
        {
            "OPENAI_BASE_URL": base_url,
            "OPENAI_API_KEY": claim.key,
            context.ENV_URL: server_url,
            context.ENV_KEY: claim.key,
            context.ENV_ROLLOUT_ID: claim.rollout.id,
            context.ENV_ATTEMPT_ID: claim.attempt.id,
            "AGENTLIGHTNING_MODEL": claim.model,
        }
    )


def _flush_application_spans() -> None:
    """The application's own exporters would flush at exit, which this process does not reach."""
    api = sys.modules.get("opentelemetry.trace")
    flush = getattr(api.get_tracer_provider(), "force_flush", None) if api is not None else None
    if callable(flush):
        with contextlib.suppress(Exception):
            flush(int(FLUSH_S * 1000))


def _reseed() -> None:
    """Forked siblings must not draw the same trace ids and random numbers."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
