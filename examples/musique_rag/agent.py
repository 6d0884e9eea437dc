"""An ordinary agent of the OpenAI Agents SDK that searches an encyclopedia and answers from what it found.

Ours are the two lines marked below: the adapter, which records what the agent does, and `solve`, which runs
one task for training and says how good the result was. Everything else is the agent as its author wrote it.
"""

from __future__ import annotations

import os
from typing import Any

import httpx
from agents import Agent, AgentsException, ModelSettings, RunConfig, Runner, function_tool

import agentlightning_openai_agents
from agentlightning import RolloutContext
from examples.musique_rag import ENV_RETRIEVER
from examples.musique_rag.reward import reward

agentlightning_openai_agents.instrument()  # ours: the adapter

PASSAGES = 2
SHOWN_CHARACTERS = 350  # of a passage
MAX_TURNS = 3
INSTRUCTIONS = "Search, then answer in a few words between <answer> and </answer>."
EXAMPLES = (
    ("Who wrote The Salt Road?", "who wrote The Salt Road",
     "The Salt Road: The Salt Road is a novel by Pia Lund. It won a prize in 1931.", "Pia Lund"),
    ("When was the library of Tolm opened?", "library of Tolm opened",
     "Tolm Library: The Tolm Library was designed by Hanne Roth and opened in 1904.", "1904"),
)  # fmt: skip


@function_tool
async def search(query: str) -> str:
    """Find passages of the encyclopedia."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        response = await client.post(
            f"{os.environ[ENV_RETRIEVER]}/search", json={"query": query, "count": PASSAGES}
        )
        response.raise_for_status()
    found = response.json()["passages"]
    return "\n".join(f"{passage['title']}: {passage['text'][:SHOWN_CHARACTERS]}" for passage in found)


def conversation(question: str) -> list[Any]:
    """The worked examples as earlier turns (question, search, passage, answer), then the question."""
    items: list[Any] = []
    for number, (asked, query, passage, answer) in enumerate(EXAMPLES):
        call_id = f"example-{number}"
        items += [
            {"role": "user", "content": asked},
            {"type": "function_call", "call_id": call_id, "name": "search",
             "arguments": f'{{"query": "{query}"}}'},
            {"type": "function_call_output", "call_id": call_id, "output": passage},
            {"role": "assistant", "content": f"<answer>{answer}</answer>"},
        ]  # fmt: skip
    return [*items, {"role": "user", "content": question}]


def make_agent(model: str = "policy") -> Agent[Any]:
    """The agent. Its client finds the server in OPENAI_BASE_URL and OPENAI_API_KEY, as always."""
    return Agent(
        name="researcher",
        instructions=INSTRUCTIONS,
        model=model,
        tools=[search],
        model_settings=ModelSettings(temperature=0.7, max_tokens=40),
    )


async def solve(task: dict[str, Any], ctx: RolloutContext) -> float:  # ours: one task, and its reward
    """Answer {"question", "golds"}; the reward is 0.9 · F1 + 0.1 for an answer in its tags."""
    config = RunConfig(tool_not_found_behavior="return_error_to_model")
    try:
        result = await Runner.run(
            make_agent(ctx.model), conversation(task["question"]), max_turns=MAX_TURNS, run_config=config
        )
    except AgentsException:  # too many turns, say: no answer
        return 0.0
    return reward(str(result.final_output), task["golds"])
