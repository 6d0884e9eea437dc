"""AIR's default rules on what the adapters record: the same signals on the same calls for every framework.

Agents and server are those of the acceptance matrix.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from tests.adapters.acceptance.harness import SCRIPTS, Case, Driver, Stage, staged
from tests.adapters.acceptance.test_matrix import INSTALLED, driver_of
from tests.support.scripted_engine import Cut, tool_call

from agentlightning.learning import AIR, apply_air
from agentlightning.tracing import get_tracer
from agentlightning.types import Episode

Signals = list[tuple[str, int, str | None]]
"""(rule, number of the call that is paid, tool call that is the evidence; None for the answer itself)."""


@dataclass(frozen=True, slots=True)
class Play:
    """One agent, what its model says, and what AIR is to find."""

    case: Case
    script: Callable[[], list[Any]]
    signals: Signals


def scripted(case: Case, signals: Signals) -> Play:
    return Play(case, SCRIPTS[case], signals)


PLAYS: Mapping[str, Play] = {
    "ok": scripted(Case.OK, [("tool_succeeded", 0, "add")]),
    "tool raises": scripted(Case.TOOL_RAISES, [("tool_raised", 0, "boom")]),
    "unknown tool": scripted(Case.UNKNOWN_TOOL, [("unknown_tool", 0, "nope")]),
    "bad arguments": scripted(Case.BAD_ARGUMENTS, [("bad_arguments", 0, "add")]),
    "same call again": Play(
        Case.OK,
        lambda: [tool_call("add", a=1, b=2), tool_call("add", a=1, b=2), "three"],
        [("repeated_call", 1, "add"), ("tool_succeeded", 0, "add"), ("tool_succeeded", 1, "add")],
    ),
    "failed, then mended": Play(
        Case.OK,
        lambda: [tool_call("add", a="z"), tool_call("add", a=1, b=2), "three"],
        [("bad_arguments", 0, "add"), ("tool_succeeded", 1, "add")],
    ),
    "two calls in one answer": Play(
        Case.OK,
        lambda: [tool_call("add", a=1, b=2) + tool_call("add", a="z"), "three"],
        [("bad_arguments", 0, "add"), ("tool_succeeded", 0, "add")],
    ),
    "truncated": Play(Case.OK, lambda: [Cut("thre")], [("truncated", 0, None)]),
    "malformed tool call": Play(
        Case.OK, lambda: ['<tool_call>{"name": "add", </tool_call>'], [("malformed_call", 0, None)]
    ),
    "structured": scripted(Case.STRUCTURED, []),
    "structured, cut": Play(
        Case.STRUCTURED, lambda: [Cut('{"a": ')], [("malformed_output", 0, None), ("truncated", 0, None)]
    ),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("air"), "light") as running:
        yield running


@pytest.fixture(scope="module", params=INSTALLED)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    chosen = driver_of(request.param)
    chosen.instrument()
    yield chosen
    chosen.uninstrument()


def played(driver: Driver, play: Play, stage: Stage) -> Episode:
    """The episode of one run; what the run itself raises is not looked at."""
    before = stage.rollout_ids()
    agent = driver.agent(play.case, stage, stage.model(play.script()))

    async def run() -> None:
        await asyncio.gather(agent.arun(), return_exceptions=True)

    stage.loop.run(run())
    assert get_tracer().flush(10)
    (rollout_id,) = stage.rollout_ids() - before
    return stage.record(rollout_id)[0]


def found(episode: Episode) -> Signals:
    numbers = {transition.span_id: i for i, transition in enumerate(episode.transitions)}
    tools = {tool.span_id: tool.name for tool in episode.tool_calls}
    shaped = apply_air(episode, AIR(bound=100))
    return sorted((s.rule, numbers[s.call_span_id], tools.get(s.evidence_span_id)) for s in shaped.signals)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")
@pytest.mark.parametrize("name", PLAYS)
def test_the_default_rules_find_the_same_signals_in_every_framework(
    driver: Driver, stage: Stage, name: str
) -> None:
    play = PLAYS[name]
    assert found(played(driver, play, stage)) == play.signals
