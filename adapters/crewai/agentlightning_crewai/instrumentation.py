"""Which functions of CrewAI are wrapped, and taking that back.

CrewAI's events are handled later, in other threads and unordered, with messages and tools cut off at a depth
of five, so what is recorded comes from the calls themselves: kickoffs and runs of agents (`runs`), the
requests of its models (`llm`) and the execution of a tool call (`tools`).
"""

# pyright: reportPrivateUsage=false, reportDeprecated=false

from __future__ import annotations

from typing import Final

from crewai import Agent, Crew, Flow, lite_agent
from crewai.agents import agent_executor, step_executor
from crewai.llms.base_llm import BaseLLM
from crewai.llms.providers.openai.completion import OpenAICompletion
from crewai.tools import base_tool, tool_usage
from crewai.tools.agent_tools.base_agent_tools import BaseAgentTool
from crewai.tools.structured_tool import CrewStructuredTool
from crewai.utilities import agent_utils, tool_utils
from openai import _base_client

from agentlightning import openai_sdk
from agentlightning.tracing.patching import Patches
from agentlightning_crewai import llm, runs, tools

_OWNER: Final = "crewai"
_patches: Final = Patches()


def instrument() -> None:
    """Record every crew, agent and flow of this process from now on. Calling it again changes nothing."""
    openai_sdk.install(_OWNER)
    if _patches:
        return
    _wrap_runs()
    _wrap_llm()
    _wrap_tools()


def uninstrument() -> None:
    """Take it back."""
    _patches.undo()
    openai_sdk.uninstall(_OWNER)


def _wrap_runs() -> None:
    # What is not here calls what is: `kickoff_async` and `kickoff_for_each` of a crew, `kickoff` of a flow.
    _patches.wrap(Crew, "kickoff", runs.wrap_run(runs.crew_run))
    _patches.wrap(Crew, "akickoff", runs.wrap_run(runs.crew_run))
    _patches.wrap(Crew, "replay", runs.wrap_run(runs.crew_run))
    _patches.wrap(Flow, "kickoff_async", runs.wrap_run(runs.flow_run))
    _patches.wrap(Flow, "resume_async", runs.wrap_run(runs.flow_run))
    _patches.wrap(Agent, "execute_task", tools.wrap_delegated_run)
    _patches.wrap(Agent, "execute_task", runs.wrap_run(runs.task_run))
    _patches.wrap(Agent, "aexecute_task", runs.wrap_run(runs.task_run))
    _patches.wrap(Agent, "kickoff", runs.wrap_run(runs.agent_run_outside_loop))
    _patches.wrap(Agent, "kickoff_async", runs.wrap_run(runs.agent_run))
    _patches.wrap(lite_agent.LiteAgent, "kickoff", runs.wrap_run(runs.agent_run))


def _wrap_llm() -> None:
    for name in ("_call_completions", "_acall_completions", "_call_responses", "_acall_responses"):
        _patches.wrap(OpenAICompletion, name, llm.wrap_ask)
    _patches.wrap(_base_client.SyncAPIClient, "request", llm.wrap_request)
    _patches.wrap(_base_client.AsyncAPIClient, "request", llm.wrap_request)


def _wrap_tools() -> None:
    _patches.wrap(agent_executor.AgentExecutor, "_execute_single_native_tool_call", tools.wrap_native_call)
    _patches.wrap(step_executor, "execute_single_native_tool_call", tools.wrap_native_step)
    for module in (agent_executor, step_executor, lite_agent):
        _patches.wrap(module, "execute_tool_and_check_finality", tools.wrap_text_call)
    _patches.wrap(BaseLLM, "_handle_tool_execution", tools.wrap_llm_call)
    for module in (agent_executor, agent_utils, tool_utils):
        _patches.wrap(module, "handle_tool_failure", tools.wrap_handle_failure)
    for module in (agent_executor, agent_utils, tool_usage):
        _patches.wrap(module, "failure_from_exception", tools.wrap_failure_of)
    _patches.wrap(base_tool.BaseTool, "_validate_kwargs", tools.wrap_validation)
    _patches.wrap(CrewStructuredTool, "_parse_args", tools.wrap_validation)
    _patches.wrap(tool_usage.ToolUsage, "_select_tool", tools.wrap_select)
    _patches.wrap(tool_usage.ToolUsage, "on_tool_error", tools.wrap_tool_error)
    _patches.wrap(BaseAgentTool, "_execute", tools.wrap_delegation)
