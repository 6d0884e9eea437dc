"""Attribute names on the wire, one constant each.

The `gen_ai.*` names are OpenTelemetry's GenAI semantic conventions (repository
open-telemetry/semantic-conventions-genai, development status), copied as strings because the Python constants
lag behind. The `agentlightning.*` names cover what the conventions lack.
Token ids and log-probabilities travel as bytes: as arrays of numbers they cost 34 times as much to decode.
"""

from __future__ import annotations

from typing import Final

OPERATION: Final = "gen_ai.operation.name"
OP_CHAT: Final = "chat"
OP_TOOL: Final = "execute_tool"
OP_AGENT: Final = "invoke_agent"

PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_STOP: Final = "gen_ai.request.stop_sequences"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
USAGE_INPUT: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT: Final = "gen_ai.usage.output_tokens"
INPUT_MESSAGES: Final = "gen_ai.input.messages"
"""JSON string: [{"role", "parts": [{"type": "text"|"tool_call"|"tool_call_response", ...}]}]."""
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
OUTPUT_TYPE: Final = "gen_ai.output.type"
"""What was asked for: "json", or absent for free text."""
TOOL_DEFINITIONS: Final = "gen_ai.tool.definitions"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_DESCRIPTION: Final = "gen_ai.tool.description"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
TOOL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_RESULT: Final = "gen_ai.tool.call.result"
AGENT_NAME: Final = "gen_ai.agent.name"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
ERROR_TYPE: Final = "error.type"

ROLLOUT_ID: Final = "agentlightning.rollout.id"
ATTEMPT_ID: Final = "agentlightning.attempt.id"
NODE_PATH: Final = "agentlightning.node.path"
"""Where in a graph the call was made, e.g. "writer/model"; no run-specific ids."""
PROMPT_IDS: Final = "agentlightning.prompt.token_ids"
RESPONSE_IDS: Final = "agentlightning.response.token_ids"
RESPONSE_LOGPROBS: Final = "agentlightning.response.logprobs"
POLICY_NAME: Final = "agentlightning.policy.name"
POLICY_VERSION: Final = "agentlightning.policy.version"
RESPONSE_SCHEMA: Final = "agentlightning.response.schema"
"""JSON string: the JSON schema that the text of the answer was to satisfy."""
MALFORMED_TOOL_CALL: Final = "agentlightning.malformed_tool_call"
PROMPT_CONTINUED: Final = "agentlightning.prompt.continued"
"""True when the gateway built the prompt from the recorded ids of an earlier call."""
CHOICE_INDEX: Final = "agentlightning.choice.index"
TOOL_STATUS: Final = "agentlightning.tool.status"
"""A value of `types.ToolStatus`."""
REWARD_VALUE: Final = "agentlightning.reward.value"
REWARD_NAME: Final = "agentlightning.reward.name"
REWARD_TARGET: Final = "agentlightning.reward.target_span_id"

INTERRUPTED: Final = "interrupted"
"""Event of a span that ended because a person is to be asked; what follows has a span of its own."""

SCOPE_GATEWAY: Final = "agentlightning.gateway"
SCOPE_REWARD: Final = "agentlightning.reward"

HEADER_ROLLOUT: Final = "x-agentlightning-rollout"
HEADER_ATTEMPT: Final = "x-agentlightning-attempt"
HEADER_TRACEPARENT: Final = "x-agentlightning-traceparent"
"""The same as `traceparent`, which instrumentations of HTTP clients overwrite with spans we never see."""
