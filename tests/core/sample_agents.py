"""Agents for the tests of the runner: one function that does what its task says."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from agentlightning.rewards import emit_reward
from agentlightning.runner import RolloutContext
from agentlightning.tracing import trace

imported_at = time.time_ns()


def obedient(task: Any, ctx: RolloutContext) -> Any:
    """Does what `task["do"]` names."""
    return globals()[f"do_{task['do']}"](task, ctx)


async def dutiful(task: Any) -> Any:
    """Async, without a context."""
    await asyncio.sleep(0)
    if task["do"] == "raise":
        raise ValueError("async boom")
    if task["do"] == "wait":
        await asyncio.sleep(1000)
    emit_reward(0.25, "style")
    return 1.0


def lazy(task: Any) -> None:
    """Never comes back, without doing harm."""
    time.sleep(1000)


def do_return(task: Any, ctx: RolloutContext) -> Any:
    return task["value"]


def do_nan(task: Any, ctx: RolloutContext) -> Any:
    return float("nan")


def do_raise(task: Any, ctx: RolloutContext) -> Any:
    emit_reward(0.5, "before")
    raise ValueError(f"boom \ud800 {ctx.attempt.number}")


def do_exit(task: Any, ctx: RolloutContext) -> Any:
    sys.exit(3)


def do_os_exit(task: Any, ctx: RolloutContext) -> Any:
    os._exit(4)


def do_segfault(task: Any, ctx: RolloutContext) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def do_emit(task: Any, ctx: RolloutContext) -> Any:
    for value in task["values"]:
        emit_reward(value, "step")
    return {"reward": 1, "style": 0.5}


def do_async(task: Any, ctx: RolloutContext) -> Any:
    async def inner() -> float:
        await asyncio.sleep(0)
        return 2.0

    return inner()


def do_trace(task: Any, ctx: RolloutContext) -> Any:
    with trace("thinking"):
        pass
    return 1.0


def do_random(task: Any, ctx: RolloutContext) -> Any:
    return random.random()


def do_same_import(task: Any, ctx: RolloutContext) -> Any:
    return float(imported_at)


def do_environment(task: Any, ctx: RolloutContext) -> Any:
    expected = {
        "OPENAI_BASE_URL": ctx.base_url,
        "OPENAI_API_KEY": ctx.api_key,
        "AGENTLIGHTNING_KEY": ctx.api_key,
        "AGENTLIGHTNING_ROLLOUT_ID": ctx.rollout.id,
        "AGENTLIGHTNING_ATTEMPT_ID": ctx.attempt.id,
        "AGENTLIGHTNING_MODEL": ctx.model,
        "AGENTLIGHTNING_ADMIN_KEY": None,
    }
    wrong = [name for name, value in expected.items() if os.environ.get(name) != value]
    assert not wrong, wrong
    assert ctx.base_url.endswith(f"/rollouts/{ctx.rollout.id}/attempts/{ctx.attempt.id}/v1")
    assert os.getpgid(0) == os.getpid() == os.getsid(0)
    return 1.0


def do_hang_once(task: Any, ctx: RolloutContext) -> Any:
    """Hangs at the first attempt: deaf to SIGTERM, with a child, and one that left the process group."""
    if ctx.attempt.number > 1:
        return 1.0
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    children = [
        subprocess.Popen(["sleep", "1000"]),
        subprocess.Popen(["sleep", "1000"], start_new_session=True),
    ]
    record_pids(task, os.getpid(), *(child.pid for child in children))
    while True:
        time.sleep(1000)


def do_leave_child(task: Any, ctx: RolloutContext) -> Any:
    record_pids(task, subprocess.Popen(["sleep", "1000"]).pid)
    return 1.0


def do_wait_for_file(task: Any, ctx: RolloutContext) -> Any:
    record_pids(task, os.getpid())
    while not Path(task["file"]).exists():
        time.sleep(0.01)
    return 1.0


def record_pids(task: Any, *pids: int) -> None:
    """Tell the test, whole or not at all."""
    partial = Path(task["pids"] + ".partial")
    partial.write_text(" ".join(map(str, pids)))
    partial.rename(task["pids"])
