"""What foreign instrumentations of the applications in `tests/foreign` lose, and what must be read even so.

Every application makes three model calls and two tool calls: `add` with good arguments, then with bad ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.spans import attempt, rollout

from agentlightning.otlp import spans_from_request
from agentlightning.reading import read_episode
from agentlightning.reading.comparable import request_key
from agentlightning.types import Episode, Message, Span, ToolStatus

CALLS = [{"a": 1, "b": 2}, {"a": "z"}]


@dataclass(frozen=True)
class Expected:
    """What is in the spans of one application. Defaults: everything."""

    agent: str | None = "calc"
    node: str | None = None
    response_ids: bool = True
    outputs: bool = True
    finish: bool = True
    usage: bool = True
    tools: bool = True
    temperature: float = 0.5
    executed: int = 2
    arguments: bool = True
    system: str = "You add numbers."
    failure: ToolStatus = ToolStatus.BAD_ARGUMENTS
    merged: bool = False
    """Whether two instrumentations saw the same calls."""


LOOP = Expected(agent=None, executed=0)
LANGGRAPH = Expected(node="model")
EXPECTED: dict[str, Expected] = {
    "openinference_openai": LOOP,
    "openinference_langchain": LANGGRAPH,
    "openinference_langchain_and_openai": Expected(node="model", merged=True),
    "openinference_openai_agents": Expected(response_ids=False, finish=False, tools=False),
    "openinference_openai_agents_0_24": Expected(  # this SDK's spans no longer say why a tool failed
        response_ids=False, finish=False, tools=False, failure=ToolStatus.RAISED
    ),
    "openinference_autogen": Expected(response_ids=False, tools=False, temperature=1.0, merged=True),
    "openinference_crewai": Expected(
        response_ids=False, finish=False, temperature=1.0, system="You are calc. You add numbers."
    ),
    "openinference_crewai_and_openai": Expected(system="You are calc. You add numbers."),
    "genai_openai": LOOP,
    "genai_openai_v2": Expected(agent=None, executed=0, tools=False),
    "genai_langchain": Expected(),
    "genai_openai_agents": Expected(),
    "genai_autogen": Expected(arguments=False),
    "traceloop_openai": LOOP,
    "traceloop_langchain": Expected(node="model", merged=True),
    "traceloop_openai_agents": Expected(
        response_ids=False,
        outputs=False,
        finish=False,
        usage=False,
        tools=False,
        temperature=1.0,
        arguments=True,
    ),
    "traceloop_crewai": Expected(executed=0, system="You are calc. You add numbers."),
    "traceloop_0_40_openai": LOOP,
    "traceloop_0_40_langchain": Expected(node="model", finish=False),
    "pydantic_ai": Expected(),
    "pydantic_ai_1_events": Expected(executed=1),
    "pydantic_ai_2": Expected(),
    "pydantic_ai_and_openai": Expected(merged=True),
    "pydantic_ai_2_68_and_openai": Expected(merged=True),
    "openinference_langchain_beside_ours": Expected(node="model", merged=True),
    "langchain_and_httpx": LANGGRAPH,
    "openai_and_httpx": LOOP,
}


SAMPLES = Path(__file__).parents[1] / "core" / "foreign_traces"


def sample(name: str) -> list[Span]:
    return spans_from_request(json.loads((SAMPLES / f"{name}.json").read_text()))


def episode_of(spans: Sequence[Span]) -> Episode:
    return read_episode(rollout(), attempt(), spans)


def assert_read(episode: Episode, expected: Expected, model: str = "m", exact: bool = False) -> None:
    """`exact`: the gateway's spans are there as well, which lose nothing."""
    _assert_calls(episode, expected, model, exact)
    _assert_tools(episode, expected, exact or expected.outputs)
    if expected.agent is not None:
        assert expected.agent in [run.name for run in episode.agent_runs]
        assert len(episode.agent_runs) <= 2


def _assert_calls(episode: Episode, expected: Expected, model: str, exact: bool) -> None:
    calls = episode.calls
    assert len(calls) == 3
    assert [call.model for call in calls] == [model] * 3
    assert [call.agent_name for call in calls] == [expected.agent] * 3
    assert [call.node_path for call in calls] == [expected.node] * 3
    assert [call.error for call in calls] == [None] * 3
    roles = [[_role(message) for message in call.messages] for call in calls]
    assert roles == [["system", "user", *["assistant", "tool"] * n] for n in range(3)]
    assert str(calls[0].messages[0]["content"]).startswith(expected.system)
    assert "What is 1 + 2?" in str(calls[0].messages[1]["content"])
    assert [_arguments(calls[2].messages[i]) for i in (2, 4)] == CALLS
    assert calls[1].messages[3]["content"] == "3"
    assert all((call.response_id is not None) == (exact or expected.response_ids) for call in calls)
    assert all((call.input_tokens is not None) == (exact or expected.usage) for call in calls)
    assert all(bool(call.tools) == (exact or expected.tools) for call in calls)
    assert all(call.temperature == expected.temperature for call in calls) or exact
    if exact or expected.finish:
        assert [call.finish_reason for call in calls] == ["tool_calls", "tool_calls", "stop"]
    if exact or expected.outputs:
        assert [_arguments(call.output or {}) for call in calls[:2]] == CALLS
        assert (calls[2].output or {})["content"] == "3"
    for call in calls if exact or expected.tools else ():
        assert [_function(tool)["name"] for tool in call.tools] == ["add"]
    for call in calls:  # every message can be compared, and none is empty
        assert request_key(call.messages)


def _assert_tools(episode: Episode, expected: Expected, asked: bool) -> None:
    tools = episode.tool_calls
    assert len(tools) == expected.executed
    assert [tool.name for tool in tools] == ["add"] * expected.executed
    assert [tool.status for tool in tools] == [ToolStatus.OK, expected.failure][: expected.executed]
    assert [tool.agent_name for tool in tools] == [expected.agent] * expected.executed
    assert [bool(tool.error) for tool in tools] == [False, True][: expected.executed]
    assert not any("Traceback" in (tool.error or "") for tool in tools)
    if expected.arguments:
        assert [tool.arguments for tool in tools] == CALLS[: expected.executed]
        assert all(str(tool.result) == "3" for tool in tools[:1])
    if asked:
        requested = [_call(call.output or {})["id"] for call in episode.calls[:2]]
        assert [tool.call_id for tool in tools] == requested[: expected.executed]


def _role(message: Message) -> Any:
    return "system" if message["role"] == "developer" else message["role"]


def _call(message: Message) -> dict[str, Any]:
    calls: Any = message["tool_calls"]
    assert len(calls) == 1
    function = calls[0]["function"]
    assert function["name"] == "add"
    return {"id": calls[0]["id"], "arguments": json.loads(function["arguments"])}


def _arguments(message: Message) -> Any:
    return _call(message)["arguments"]


def _function(tool: Any) -> dict[str, Any]:
    return tool["function"]
