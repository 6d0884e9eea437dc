"""Turning the recording on and off: for the process, or for what runs inside a `with`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from agents.tracing import get_trace_provider

from agentlightning_openai_agents.patches import install, uninstall
from agentlightning_openai_agents.processor import LightningTracingProcessor
from agentlightning_openai_agents.runs import Recording, process, scoped

_processor: LightningTracingProcessor | None = None
"""The one of `instrument`, which the SDK cannot be told to forget."""


def instrument() -> LightningTracingProcessor:
    """Record every run of this process from now on; returns the processor, which knows the last rollout.

    Runs are recorded whether the SDK traces them or not. Calling it again changes nothing.
    """
    global _processor
    if _processor is None:
        _processor = LightningTracingProcessor()
    _processor.active = True
    install()
    _register(_processor)
    process.recording = _processor
    return _processor


def _register(processor: LightningTracingProcessor) -> None:
    provider = get_trace_provider()
    known = getattr(getattr(provider, "_multi_processor", None), "_processors", ())
    if processor not in known:
        provider.register_processor(processor)


def uninstrument() -> None:
    """Take it back, for `record()` and processors of one's own as well, until the next of either."""
    if _processor is not None:
        _processor.active = False
    process.recording = None
    uninstall()


@contextmanager
def record() -> Generator[Recording]:
    """Record the runs that start inside; `rollout_id` of what it gives is for rewards that come later.

    Example:
        with record() as recording:
            result = await Runner.run(agent, "hi")
        recording.rollout_id
    """
    install()
    recording = Recording()
    before = scoped.get()
    scoped.set(recording)
    try:
        yield recording
    finally:
        scoped.set(before)
