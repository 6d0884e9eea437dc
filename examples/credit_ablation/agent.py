"""An ordinary AutoGen agent on a task of several steps whose reward is sparse: follow a chain of notes.

Each note names the next; the last one says that it is the end. The agent reads them with a tool, one at a
time, and has just as many calls as there are notes. It earns 1 for reaching the end and else 0: nothing tells
it which of its calls was good. A word that has no note makes the tool fail, as a real look-up would.

Ours are `instrument()` and `solve`; the rest is the agent as its author wrote it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ToolCallSummaryMessage
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
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient

import agentlightning_autogen
from agentlightning import RolloutContext, Task

agentlightning_autogen.instrument()  # ours: the adapter

END = "the end"
HOPS = 3  # notes to read, and calls to do it in
SYSTEM = "Follow the notes to the end. Read one note at a time."
_WORDS = """
amber anchor apple arrow autumn bamboo basket beacon bottle branch bridge bronze butter button cabin
camel candle canyon carpet castle cedar cherry circle cloud clover cobalt coffee copper coral cotton
crystal desert dragon eagle ember falcon feather fern flame forest garden ginger glacier granite
harbor hazel honey island ivory jasmine jungle kettle lagoon lantern lemon lily linen lotus maple
marble meadow melon mirror monkey mountain needle nickel oasis ocean olive onyx orange orchid oyster
paper parrot pebble pepper piano pillow planet plum pocket prairie quartz rabbit raven ribbon river
rocket saddle saffron sailor salmon scarlet shadow shell silver spider spruce stone summer sunset
temple thunder tiger timber topaz tulip tunnel turtle valley velvet violet walnut willow window
winter
"""
WORDS = _WORDS.split()
MODEL_INFO = ModelInfo(
    vision=False, function_calling=True, json_output=False, family="unknown", structured_output=False
)


def make_tasks(count: int, *, seed: int, split: str) -> list[Task]:
    """Chains of notes, drawn anew for every seed and split."""
    random_words = random.Random(f"{split}:{seed}")
    tasks: list[Task] = []
    for number in range(count):
        chain = random_words.sample(WORDS, HOPS)
        notes = dict(zip(chain, [*chain[1:], END], strict=True))
        tasks.append(Task(f"{split}-{seed}-{number}", {"start": chain[0], "notes": {**notes}}, split))
    return tasks


def note(word: str, says: str) -> str:
    return f"The note on {word} says: {says}"


def reading(notes: Mapping[str, str]) -> FunctionTool:
    """The tool that reads one of these notes."""

    def read(word: str) -> str:
        if word not in notes:
            raise LookupError(f"There is no note on {word!r}.")
        return note(word, notes[word])

    return FunctionTool(read, description="Read the note on a word.", name="read")


def question(start: str) -> str:
    return f"Start with the note on {start}."


def worked_example(chain: tuple[str, ...] = ("pencil",)) -> list[LLMMessage]:
    """One task done right, as earlier turns of the conversation."""
    messages: list[LLMMessage] = [UserMessage(content=question(chain[0]), source="user")]
    for i, (word, says) in enumerate(zip(chain, [*chain[1:], END], strict=True)):
        call = FunctionCall(id=f"example-{i}", name="read", arguments=f'{{"word": "{word}"}}')
        result = FunctionExecutionResult(
            content=note(word, says), name="read", call_id=call.id, is_error=False
        )
        messages += [
            AssistantMessage(content=[call], source="reader"),
            FunctionExecutionResultMessage(content=[result]),
        ]
    return messages


def make_agent(notes: Mapping[str, str], model: str = "policy") -> AssistantAgent:
    """The agent. Its client finds the server in OPENAI_BASE_URL and OPENAI_API_KEY, as always."""
    client = OpenAIChatCompletionClient(model=model, model_info=MODEL_INFO, max_tokens=32, temperature=1.0)
    return AssistantAgent(
        "reader",
        model_client=client,
        tools=[reading(notes)],
        system_message=SYSTEM,
        model_context=UnboundedChatCompletionContext(initial_messages=worked_example()),
        max_tool_iterations=HOPS,
    )


async def solve(task: dict[str, Any], ctx: RolloutContext) -> float:  # ours: one task, and its reward
    """Run the agent on {"start", "notes"}; the reward is 1 for reaching the last note, and only that."""
    result = await make_agent(task["notes"], ctx.model).run(task=question(task["start"]))
    last = result.messages[-1]
    return float(isinstance(last, ToolCallSummaryMessage) and last.content.endswith(END))
