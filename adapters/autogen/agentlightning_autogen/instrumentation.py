"""Which functions of AutoGen are wrapped, and taking that back.

AutoGen's events come without a start, a duration or a parent, name the wrong agent for nested ones and are
missing for failures, so the functions themselves are wrapped: the client's request (`llm`), the execution of
a tool call (`tools`) and the run of an agent or team (`agents`).
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Final

from autogen_agentchat.agents import AssistantAgent, BaseChatAgent
from autogen_agentchat.teams import BaseGroupChat
from autogen_agentchat.teams._group_chat import _chat_agent_container as container
from autogen_core.tools import BaseStreamTool, BaseTool, FunctionTool
from autogen_ext.models.openai import BaseOpenAIChatCompletionClient, _openai_client

from agentlightning import openai_sdk
from agentlightning.tracing.patching import Patches
from agentlightning_autogen import agents, llm, tools

_OWNER: Final = "autogen"
_patches: Final = Patches()


def instrument() -> None:
    """Record every AutoGen agent of this process from now on. Calling it again changes nothing."""
    openai_sdk.install(_OWNER)
    if _patches:
        return
    _patches.wrap(BaseOpenAIChatCompletionClient, "create", llm.wrap_create)
    _patches.wrap(BaseOpenAIChatCompletionClient, "create_stream", llm.wrap_create_stream)
    _patches.wrap(BaseOpenAIChatCompletionClient, "_process_create_args", llm.wrap_process_create_args)
    _patches.wrap(_openai_client, "LLMCallEvent", llm.wrap_call_event)
    _patches.wrap(AssistantAgent, "_execute_tool_call", tools.wrap_execute_tool_call)
    _patches.wrap(BaseTool, "run_json", tools.wrap_run_json)
    _patches.wrap(BaseStreamTool, "run_json_stream", tools.wrap_run_json_stream)
    _patches.wrap(FunctionTool, "run", tools.wrap_function_tool_run)
    _patches.wrap(BaseChatAgent, "run", agents.wrap_run)
    _patches.wrap(BaseChatAgent, "run_stream", agents.wrap_run_stream)
    _patches.wrap(AssistantAgent, "on_messages_stream", agents.wrap_on_messages_stream)
    _patches.wrap(BaseGroupChat, "run_stream", agents.wrap_run_stream)
    _patches.wrap(container, "trace_invoke_agent_span", agents.wrap_invoke_agent_span)


def uninstrument() -> None:
    """Take it back."""
    _patches.undo()
    openai_sdk.uninstall(_OWNER)
