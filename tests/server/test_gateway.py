from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Generator
from typing import Any

import httpx
import openai
import pytest
from tests.support.serving import serving, tiny_engine
from tests.support.spans import rollout
from tests.support.waiting import wait_until

from agentlightning.reading import join_calls, read_trace
from agentlightning.types import LLMCall, Mode, RolloutStatus, SpanStatus, live_rollout_id
from agentlightning_server.store import RolloutFilter
from agentlightning_server.training.local import LocalServer

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TRACEPARENT = f"00-{'c' * 32}-{'d' * 16}-01"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[LocalServer]:
    folder = tmp_path_factory.mktemp("gateway")
    with serving(tiny_engine(folder), folder) as running:
        yield running


def client_of(server: LocalServer, path: str = "", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}{path}/v1", api_key=server.key, max_retries=0, **options)


def calls_of(server: LocalServer, rollout_id: str) -> list[LLMCall]:
    return list(join_calls(read_trace(server.store.spans(rollout_id))).calls)


def enqueue(server: LocalServer, rollout_id: str) -> tuple[str, str]:
    """A claimed rollout: (attempt id, attempt key)."""
    server.store.enqueue([rollout(id=rollout_id, group_id=rollout_id, status=RolloutStatus.QUEUED)])
    (claim,) = [c for c in server.store.claim("w", 100) if c.rollout.id == rollout_id]
    return claim.attempt.id, claim.key


def test_the_recorded_ids_and_logprobs_are_those_of_the_answer(server: LocalServer) -> None:
    with client_of(server) as client:
        answer = client.chat.completions.create(
            model="policy",
            messages=HELLO,
            max_tokens=8,
            logprobs=True,
            extra_body={"return_token_ids": True},
            extra_headers={"traceparent": TRACEPARENT},
        )
    (call,) = calls_of(server, live_rollout_id("c" * 32))
    assert call.response_ids is not None
    assert call.logprobs is not None
    assert call.response_ids.tolist() == answer.choices[0].model_extra["token_ids"]  # type: ignore[index]
    assert call.logprobs.tolist() == pytest.approx(
        [token.logprob for token in answer.choices[0].logprobs.content]  # type: ignore[union-attr]
    )
    assert (call.response_id, call.parent_id, call.policy) == (answer.id, "d" * 16, "policy")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(call.response_ids)


def test_a_stream_and_a_plain_call_give_and_store_the_same(server: LocalServer) -> None:
    usage: Any = {"include_usage": True}
    with client_of(server, "/rollouts/same/attempts/same-1") as client:
        plain = client.chat.completions.create(model="policy", messages=HELLO, max_tokens=40, seed=7)
        with client.chat.completions.create(
            model="policy", messages=HELLO, max_tokens=40, seed=7, stream=True, stream_options=usage
        ) as stream:
            chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason
    first, second = calls_of(server, "same")
    assert first.response_ids is not None
    assert second.response_ids is not None
    assert first.response_ids.tolist() == second.response_ids.tolist()


def test_n_choices_are_n_answers_with_their_own_seeds(server: LocalServer) -> None:
    with client_of(server, "/rollouts/many/attempts/many-1") as client:
        answer = client.chat.completions.create(model="policy", messages=HELLO, max_tokens=12, n=3, seed=1)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    calls = calls_of(server, "many")
    assert len(calls) == 3
    assert {call.response_id for call in calls} == {answer.id}


def test_stop_ends_the_text_before_the_stop_string(server: LocalServer) -> None:
    with client_of(server) as client:
        free = client.chat.completions.create(model="policy", messages=HELLO, max_tokens=30, seed=3)
        text = free.choices[0].message.content or ""
        stop = text[4:6]
        held = client.chat.completions.create(
            model="policy", messages=HELLO, max_tokens=30, seed=3, stop=[stop]
        )
    assert held.choices[0].message.content == text[: text.index(stop)]
    assert held.choices[0].finish_reason == "stop"


def test_top_logprobs_contain_the_likeliest_tokens(server: LocalServer) -> None:
    with client_of(server) as client:
        answer = client.chat.completions.create(
            model="policy", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
        )
    for token in answer.choices[0].logprobs.content:  # type: ignore[union-attr]
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)


def test_a_request_that_extends_a_call_continues_its_very_ids(server: LocalServer) -> None:
    with client_of(server, "/rollouts/chain/attempts/chain-1") as client:
        first = client.chat.completions.create(model="policy", messages=HELLO, max_tokens=20)
        history: list[Any] = [*HELLO, {"role": "assistant", "content": first.choices[0].message.content}]
        client.chat.completions.create(
            model="policy", messages=[*history, {"role": "user", "content": "more"}], max_tokens=5
        )
    one, two = calls_of(server, "chain")
    assert one.prompt_ids is not None
    assert one.response_ids is not None
    assert two.prompt_ids is not None
    so_far = [*one.prompt_ids.tolist(), *one.response_ids.tolist()]
    assert two.prompt_ids.tolist()[: len(so_far)] == so_far
    rest = server.engine.tokenizer.decode(two.prompt_ids.tolist()[len(so_far) :])
    assert rest.endswith("\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")


def test_an_attempt_key_speaks_for_its_own_attempt(server: LocalServer) -> None:
    attempt_id, key = enqueue(server, "own")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        client.chat.completions.create(model="policy", messages=HELLO, max_tokens=2)
    (span,) = server.store.spans("own")
    assert (span.rollout_id, span.attempt_id) == ("own", attempt_id)
    with (
        openai.OpenAI(
            base_url=f"{server.url}/rollouts/other/attempts/other-1/v1", api_key=key, max_retries=0
        ) as client,
        pytest.raises(openai.PermissionDeniedError),
    ):
        client.chat.completions.create(model="policy", messages=HELLO, max_tokens=2)


def test_an_unknown_model_names_what_is_served_and_leaves_a_span(server: LocalServer) -> None:
    with (
        client_of(server, "/rollouts/wrong/attempts/wrong-1") as client,
        pytest.raises(openai.NotFoundError, match=r"'gpt-9' does not exist.*serves: policy") as caught,
    ):
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"
    (span,) = server.store.spans("wrong")
    assert span.status is SpanStatus.ERROR
    assert "gpt-9" in span.status_message


def test_an_over_long_prompt_names_its_size(server: LocalServer) -> None:
    with (
        client_of(server) as client,
        pytest.raises(openai.BadRequestError, match="the model reads at most") as e,
    ):
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "x" * 5000}])
    assert e.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ({"messages": HELLO}, "'model' must be"),
        ({"model": "policy"}, "'messages' must be"),
        ({"model": "policy", "messages": [{"role": "robot", "content": ""}]}, r"messages\[0\].role"),
        ({"model": "policy", "messages": [7]}, r"messages\[0\].role"),
        (
            {"model": "policy", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "only text is supported",
        ),
        ({"model": "policy", "messages": HELLO, "temperature": -1}, "'temperature' must be"),
        ({"model": "policy", "messages": HELLO, "n": 0}, "'n' must be"),
        ({"model": "policy", "messages": HELLO, "max_tokens": "many"}, "'max_tokens' must be"),
        ({"model": "policy", "messages": HELLO, "stop": [""]}, "'stop' must be"),
        ({"model": "policy", "messages": HELLO, "logit_bias": {"1": 5}}, "'logit_bias' is not supported"),
        (
            {"model": "policy", "messages": HELLO, "response_format": {"type": "xml"}},
            "'response_format'",
        ),
    ],
)
def test_a_bad_request_is_refused_with_the_field_named(
    server: LocalServer, body: object, sentence: str
) -> None:
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=body if isinstance(body, str) else json.dumps(body),
        headers={"authorization": f"Bearer {server.key}"},
    )
    assert response.status_code == 400
    assert re.search(sentence, response.json()["error"]["message"])


def test_models_are_listed_with_their_version(server: LocalServer) -> None:
    with client_of(server) as client:
        (model,) = client.models.list().data
        assert model.id == "policy"
        assert client.models.retrieve("policy").id == "policy"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nothing")


def test_a_client_that_leaves_ends_its_generation(server: LocalServer) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/rollouts/gone/attempts/gone-1/v1", api_key=server.key, max_retries=0
        ) as client:
            asking = asyncio.create_task(
                client.chat.completions.create(model="policy", messages=HELLO, max_tokens=900, n=32)
            )
            await asyncio.sleep(0.3)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(leave())
    wait_until(lambda: "gone" in {r.id for r in server.store.rollouts()})
    spans = server.store.spans("gone")
    assert [span.status for span in spans] == [SpanStatus.ERROR]
    assert "disconnected" in spans[0].status_message


def test_a_call_without_a_rollout_opens_a_live_one_that_ends_with_it(server: LocalServer) -> None:
    before = len(server.store.rollouts(RolloutFilter(mode="live")))  # type: ignore[arg-type]
    with client_of(server) as client:
        client.chat.completions.create(model="policy", messages=HELLO, max_tokens=2)
    live = server.store.rollouts(RolloutFilter(mode=Mode.LIVE))
    assert len(live) == before + 1


def test_a_key_is_needed(server: LocalServer) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(model="policy", messages=HELLO)


def test_an_error_that_nobody_foresaw_leaves_the_connection_as_it_was(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> object:
        raise RuntimeError("the engine broke")

    body = {"model": "policy", "messages": HELLO, "max_tokens": 1}
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}) as client:
        with monkeypatch.context() as patch:
            patch.setattr(server.engine, "generate", broken)
            failed = client.post("/v1/chat/completions", json=body)
        assert failed.status_code == 500
        assert "the engine broke" not in failed.text
        sockets = {failed.extensions["network_stream"].get_extra_info("client_addr")}
        answered = client.post("/v1/chat/completions", json=body)
        sockets.add(answered.extensions["network_stream"].get_extra_info("client_addr"))
    assert answered.status_code == 200
    assert len(sockets) == 1


def test_the_responses_api_is_refused_with_what_to_use_instead(server: LocalServer) -> None:
    with client_of(server) as client, pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.responses.create(model="policy", input="hello")
