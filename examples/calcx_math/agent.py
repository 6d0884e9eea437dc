"""An ordinary AutoGen agent that answers math word problems with a calculator.

Ours are the two lines marked below: the adapter, which records what the agent does, and `solve`, which runs
one task for training and says how good the result was. Everything else is the agent as its author wrote it.
"""

from __future__ import annotations

from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_core import FunctionCall
from autogen_core.model_context import UnboundedChatCompletionContext
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    ModelInfo,
    UserMessage,
)
from autogen_ext.models.openai import OpenAIChatCompletionClient

import agentlightning_autogen
from agentlightning import RolloutContext
from examples.calcx_math.calculator import evaluate, shown
from examples.calcx_math.reward import strict_reward

agentlightning_autogen.instrument()  # ours: the adapter

SYSTEM = "Solve the problem with the calculator, then say the answer."
MODEL_INFO = ModelInfo(
    vision=False, function_calling=True, json_output=False, family="unknown", structured_output=False
)
EXAMPLES = (
    ("Tom had 12 pens. He bought 7 more pens. How many pens does he have now?", "12 + 7"),
    ("Each box holds 6 eggs. How many eggs are in 15 boxes?", "15 * 6"),
    ("Lisa had 31 stamps. She gave 14 stamps to Bob. How many stamps does she have left?", "31 - 14"),
    ("48 apples are put equally in 8 bags. How many apples are in each bag?", "48 / 8"),
)


def calculator(expression: str) -> str:
    """Work out an arithmetic expression such as (12 + 7) * 3."""
    return shown(evaluate(expression))


def worked_examples() -> list[LLMMessage]:
    """The examples as earlier turns of the conversation: question, tool call, result, answer."""
    messages: list[LLMMessage] = []
    for number, (question, expression) in enumerate(EXAMPLES):
        call = FunctionCall(
            id=f"example-{number}", name="calculator", arguments=f'{{"expression": "{expression}"}}'
        )
        result = FunctionExecutionResult(
            content=calculator(expression), name="calculator", call_id=call.id, is_error=False
        )
        messages += [
            UserMessage(content=question, source="user"),
            AssistantMessage(content=[call], source="mathematician"),
            FunctionExecutionResultMessage(content=[result]),
            AssistantMessage(content=f"The answer is {result.content}.", source="mathematician"),
        ]
    return messages


def make_agent(model: str = "policy") -> AssistantAgent:
    """The agent. Its client finds the server in OPENAI_BASE_URL and OPENAI_API_KEY, as always."""
    client = OpenAIChatCompletionClient(model=model, model_info=MODEL_INFO, max_tokens=48, temperature=1.0)
    return AssistantAgent(
        "mathematician",
        model_client=client,
        tools=[calculator],
        system_message=SYSTEM,
        model_context=UnboundedChatCompletionContext(initial_messages=worked_examples()),
        max_tool_iterations=3,
    )


async def solve(task: dict[str, Any], ctx: RolloutContext) -> float:  # ours: one task, and its reward
    """Run the agent on {"question", "answer"}; the reward is 1 for a right answer that a tool returned."""
    result = await make_agent(ctx.model).run(task=task["question"])
    return strict_reward(result.messages, task["answer"])
