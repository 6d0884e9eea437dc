"""Answers held to a schema or to a tool call: asked for with the OpenAI SDK, sampled by the real engine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from typing import Annotated, Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field
from tests.support.serving import serving, tiny_engine

from agentlightning.reading import join_calls, read_trace
from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded.engine import EmbeddedEngine
from agentlightning_server.gateway.grammars import grammar_of
from agentlightning_server.gateway.requests import ChatRequest
from agentlightning_server.gateway.toolcalls import HERMES, LLAMA3_JSON, ToolFormat
from agentlightning_server.training.local import LocalServer

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Verdict(BaseModel):
    """A schema with everything that a random model gets wrong at once."""

    verdict: Literal["right", "wrong"]
    score: Literal[1, 2, 3]


def tool(name: str, *values: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"x": {"enum": values}},
        "required": ["x"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedEngine:
    return tiny_engine(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(engine: EmbeddedEngine, tmp_path_factory: pytest.TempPathFactory) -> Generator[LocalServer]:
    with serving(engine, tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def client(server: LocalServer) -> Generator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as made:
        yield made


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_its_schema(client: openai.OpenAI, temperature: float, stream: bool) -> None:
    for seed in range(4):
        asked: dict[str, Any] = {
            "model": "policy",
            "messages": HELLO,
            "temperature": temperature,
            "seed": seed,
            "response_format": Verdict,
        }
        if stream:
            with client.chat.completions.stream(**asked) as chunks:
                parsed = chunks.get_final_completion().choices[0].message.parsed
        else:
            parsed = client.chat.completions.parse(**asked).choices[0].message.parsed
        assert isinstance(parsed, Verdict)


def test_choices_of_one_request_follow_the_schema_each_on_its_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="policy", messages=HELLO, n=8, seed=1, response_format=Verdict
    )
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_an_answer_may_have_to_be_any_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="policy", messages=HELLO, max_tokens=40, seed=1, response_format={"type": "json_object"}
    )
    assert (answer.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"f", "g"}), ({"type": "function", "function": {"name": "g"}}, {"g"})],
)
def test_a_call_can_be_demanded(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    seen: set[str] = set()
    asked: dict[str, Any] = {"tools": [tool("f", "a", "b"), tool("g", "c")], "tool_choice": choice}
    if choice == "required":  # one that is named is called once anyway
        asked["parallel_tool_calls"] = False
    for seed in range(6):
        create: Any = client.chat.completions.create  # its overloads do not take a dict
        answer: ChatCompletion = create(model="policy", messages=HELLO, seed=seed, **asked)
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert json.loads(call.function.arguments)["x"] in {"f": ("a", "b"), "g": ("c",)}[call.function.name]
        assert answer.choices[0].finish_reason == "tool_calls"
        seen.add(call.function.name)
    assert seen == names


def test_what_was_sampled_is_recorded_with_the_logprobs_of_the_whole_vocabulary(
    server: LocalServer, engine: EmbeddedEngine
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/rollouts/g/attempts/g-1/v1", api_key=server.key) as client:
        client.chat.completions.parse(model="policy", messages=HELLO, seed=1, response_format=Verdict)
    (call,) = join_calls(read_trace(server.store.spans("g"))).calls
    assert call.logprobs is not None
    assert call.response_ids is not None
    assert int(call.response_ids[-1]) in engine.eos_ids
    # The only token that the grammar allows first is one of 259 to a model that knows nothing.
    assert float(call.logprobs[0]) < -2


def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        client.chat.completions.create(
            model="policy",
            messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "obj"}}},
        )


ASKED = ChatRequest("policy", HELLO)
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def texts(engine: EmbeddedEngine, request: ChatRequest, form: ToolFormat, count: int) -> list[str]:
    """What the engine says under the request's grammar, as far as it came to an end by itself."""
    grammar = grammar_of(request, form)

    async def one(seed: int) -> Completion:
        return await engine.generate([5, 6], Sampling(max_tokens=300, seed=seed, grammar=grammar), "policy")

    async def main() -> list[Completion]:
        return await asyncio.gather(*map(one, range(count)))

    ended = [c for c in asyncio.run(main()) if c.finish_reason == "stop"]
    assert ended
    return [engine.tokenizer.decode(list(c.token_ids), skip_special_tokens=True) for c in ended]


@pytest.mark.parametrize("form", [HERMES, LLAMA3_JSON], ids=lambda form: form.name)
def test_demanded_calls_are_ones_that_the_format_reads(engine: EmbeddedEngine, form: ToolFormat) -> None:
    request = replace(ASKED, tools=[tool('say "hi"', "a", "b"), tool("g", "c")], must_call=('say "hi"', "g"))
    numbers: set[int] = set()
    for text in texts(engine, request, form, 12):
        read = form.parse(text)
        assert (read.malformed, read.content) == (None, "")
        numbers.add(len(read.tool_calls))
    assert 0 not in numbers
    assert len(numbers) > 1


@pytest.mark.parametrize("form", [HERMES, LLAMA3_JSON], ids=lambda form: form.name)
def test_with_tools_and_a_schema_the_model_may_choose(engine: EmbeddedEngine, form: ToolFormat) -> None:
    request = replace(ASKED, tools=[tool("g", "c")], schema=NOTHING, parallel_tool_calls=False)
    for text in texts(engine, request, form, 12):
        assert form.parse(text).tool_calls or json.loads(text) == {}


def test_requests_with_and_without_a_grammar_do_not_disturb_each_other(engine: EmbeddedEngine) -> None:
    grammar = grammar_of(replace(ASKED, schema=Verdict.model_json_schema()), HERMES)
    prompt = [7, 8, 9]

    async def one(seed: int, grammar: str | None) -> list[int]:
        sampling = Sampling(max_tokens=40, seed=seed, grammar=grammar)
        return list((await engine.generate(prompt, sampling, "policy")).token_ids)

    async def main() -> tuple[list[list[int]], list[list[int]]]:
        alone = [await one(seed, None) for seed in range(3)]
        mixed = await asyncio.gather(*(one(s, g) for s in range(3) for g in (None, grammar)))
        return alone, mixed[::2]

    alone, beside = asyncio.run(main())
    assert alone == beside


def test_compiling_a_large_schema_keeps_nobody_waiting(server: LocalServer, client: openai.OpenAI) -> None:
    properties = {f"p{i}": {"anyOf": [{"type": "string"}, {"type": "integer"}]} for i in range(1500)}
    schema: Any = {"name": "large", "schema": {"type": "object", "properties": properties}}
    waits: list[float] = []
    done = threading.Event()

    def ask_for_models() -> None:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key) as other:
            while not done.is_set():
                began = time.monotonic()
                other.models.list()
                waits.append(time.monotonic() - began)

    asking = threading.Thread(target=ask_for_models)
    asking.start()
    began = time.monotonic()
    client.chat.completions.create(
        model="policy",
        messages=HELLO,
        n=16,
        max_tokens=2,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    took = time.monotonic() - began
    done.set()
    asking.join()
    assert len(waits) > 3, "others were answered meanwhile"
    assert max(waits) < took


def test_a_schema_beyond_the_limit_is_refused(client: openai.OpenAI) -> None:
    schema: Any = {"name": "huge", "schema": {"enum": [f"value number {i}" for i in range(20_000)]}}
    with pytest.raises(openai.BadRequestError, match="ask for less"):
        client.chat.completions.create(
            model="policy", messages=HELLO, response_format={"type": "json_schema", "json_schema": schema}
        )


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Literal[7, 9]


class Dog(BaseModel):
    kind: Literal["dog"]


class Pet(BaseModel):
    """A discriminated union, whose schema has oneOf and $ref."""

    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


def test_a_discriminated_union_can_be_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="policy", messages=HELLO, n=32, seed=1, temperature=2, response_format=Pet
    )
    pets = [choice.message.parsed for choice in answer.choices]
    assert {pet.pet.kind for pet in pets if pet is not None} == {"cat", "dog"}
    assert None not in pets
