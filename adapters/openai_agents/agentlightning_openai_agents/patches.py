"""Which functions of the SDK are wrapped, and taking that back.

All of them only look: they record where a run is recorded. The one that does more is `get_model`, for models
at our server.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Final

from agents import run, tool
from agents.exceptions import ToolTimeoutError
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from agents.models.openai_provider import OpenAIProvider
from agents.models.openai_responses import OpenAIResponsesModel
from agents.run_internal import run_loop, tool_execution, turn_resolution
from agents.tracing.processors import BackendSpanExporter
from openai.resources.chat.completions import AsyncCompletions

from agentlightning import openai_sdk
from agentlightning.tracing.patching import Patches
from agentlightning_openai_agents import endpoints, llm, runs, tools

_OWNER: Final = "openai_agents"
_patches: Final = Patches()


def install() -> None:
    """Wrap them. Calling it again changes nothing."""
    openai_sdk.install(_OWNER)
    if _patches:
        return
    _patches.wrap(run.AgentRunner, "run", runs.wrap_run)
    _patches.wrap(run, "start_streaming", runs.wrap_start_streaming)
    _patches.wrap(run, "run_single_turn", runs.wrap_turn)
    _patches.wrap(run_loop, "run_single_turn_streamed", runs.wrap_turn)
    _patches.wrap(OpenAIChatCompletionsModel, "_fetch_response", llm.wrap_fetch_response)
    _patches.wrap(OpenAIResponsesModel, "_fetch_response", llm.wrap_fetch_response)
    _patches.wrap(AsyncCompletions, "create", llm.wrap_create)
    _patches.wrap(OpenAIResponsesModel, "_build_response_create_kwargs", llm.wrap_build_create_kwargs)
    _patches.wrap(tool_execution._FunctionToolBatchExecutor, "_run_single_tool", tools.wrap_run_single_tool)
    for module in (tool, tool_execution):
        _patches.wrap(module, "maybe_invoke_function_tool_failure_error_function", tools.wrap_word_failure)
    _patches.wrap(ToolTimeoutError, "__init__", tools.wrap_timeout_init)
    _patches.wrap(turn_resolution, "process_model_response", tools.wrap_process_model_response)
    _patches.wrap(turn_resolution, "_build_tool_not_found_output_items", tools.wrap_build_not_found_items)
    _patches.wrap(turn_resolution, "execute_handoffs", tools.wrap_execute_handoffs)
    _patches.wrap(OpenAIProvider, "get_model", endpoints.wrap_get_model)
    _patches.wrap(BackendSpanExporter, "_export_with_deadline", endpoints.wrap_export)


def uninstall() -> None:
    """Take it back."""
    _patches.undo()
    openai_sdk.uninstall(_OWNER)
