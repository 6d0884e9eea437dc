"""Routed models: what goes to another endpoint, what comes back, what is recorded, what is kept secret."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.support.chat_endpoint import STALL, ChatEndpoint, Refusal, completion
from tests.support.serving import tiny_engine
from tests.support.spans import rollout
from tests.support.waiting import wait_until

from agentlightning import semconv
from agentlightning.errors import InvalidInput
from agentlightning.learning.air import AIR, find_signals
from agentlightning.reading import read_episode
from agentlightning.types import Attempt, Episode, RolloutStatus, Span, SpanStatus
from agentlightning_server.gateway import load_upstreams
from agentlightning_server.settings import Settings
from agentlightning_server.training.local import LocalServer, local_server

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SECRET = "sk-upstream-secret-1234"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 1}'},
}


@dataclass(frozen=True)
class Stage:
    """A server of ours, the endpoint behind its routed name "checker", and one rollout for the test."""

    server: LocalServer
    endpoint: ChatEndpoint
    rollout_id: str

    @property
    def url(self) -> str:
        return f"{self.server.url}/rollouts/{self.rollout_id}/attempts/{self.rollout_id}-1/v1"

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.server.key, max_retries=0, **options)

    def post(self, **body: Any) -> httpx.Response:
        headers = {
            "authorization": f"Bearer {self.server.key}",
            "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
        }
        body = {"model": "checker", "messages": HELLO, **body}
        return httpx.post(f"{self.url}/chat/completions", json=body, headers=headers, timeout=20)

    def spans(self) -> list[Span]:
        return list(self.server.store.spans(self.rollout_id))

    def episode(self) -> Episode:
        attempt = Attempt(f"{self.rollout_id}-1", self.rollout_id, 1, "w")
        return read_episode(rollout(id=self.rollout_id), attempt, self.spans())


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[LocalServer, ChatEndpoint]]:
    folder = tmp_path_factory.mktemp("upstreams")
    with ChatEndpoint() as endpoint, socket.socket() as refusing, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHECKER_KEY", SECRET)
        refusing.bind(("127.0.0.1", 0))  # and does not listen
        nobody = f"http://127.0.0.1:{refusing.getsockname()[1]}/v1"
        table = {
            "checker": {"url": endpoint.url, "model": "big", "key_env": "CHECKER_KEY"},
            "keyless": {"url": endpoint.url + "/", "timeout_s": 0.3},
            "nobody": {"url": nobody, "key_env": "CHECKER_KEY"},
        }
        (folder / "upstreams.json").write_text(json.dumps(table))
        settings = Settings(port=0, database=folder / "store.db", upstreams=folder / "upstreams.json")
        with local_server(tiny_engine(folder), settings) as server:
            yield server, endpoint


@pytest.fixture
def stage(serving: tuple[LocalServer, ChatEndpoint], request: pytest.FixtureRequest) -> Stage:
    server, endpoint = serving
    endpoint.received.clear()
    endpoint.script.clear()
    name: str = request.node.name
    return Stage(server, endpoint, "".join(c if c.isalnum() else "-" for c in name)[-60:].strip("-"))


# --- what goes out -------------------------------------------------------------------------------


def test_a_request_goes_out_as_it_came_but_for_the_models_name_and_the_keys(stage: Stage) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
        "n": 2,
        "tools": [TOOL],
        "tool_choice": "required",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 7,
        "logit_bias": {"1": 5},
        "frequency_penalty": 1.5,
        "temperature": 1e-9,
        "reasoning_effort": "low",
        "unheard_of": {"a": [1, None]},
        "ü": "é",
    }
    assert stage.post(**body).status_code == 200
    (received,) = stage.endpoint.received
    assert received.path == "/v1/chat/completions"
    assert received.body == {"model": "big", **body}
    assert received.headers["authorization"] == f"Bearer {SECRET}"
    sent = json.dumps(received.headers)
    assert stage.server.key not in sent
    assert "a" * 32 not in sent, "whose call it is stays here"


def test_a_stream_is_asked_for_whole(stage: Stage) -> None:
    assert stage.post(stream=True, stream_options={"include_usage": True}, max_tokens=3).status_code == 200
    (received,) = stage.endpoint.received
    assert received.body == {"model": "big", "messages": HELLO, "max_tokens": 3}


def test_an_endpoint_without_a_key_gets_none(stage: Stage) -> None:
    assert stage.post(model="keyless").status_code == 200
    (received,) = stage.endpoint.received
    assert received.body["model"] == "keyless"
    assert "authorization" not in received.headers


# --- what comes back -----------------------------------------------------------------------------

ANSWERS: dict[str, list[dict[str, Any]]] = {
    "text": [{"content": "this is fine, as far as I can see"}],
    "tools": [{"content": None, "tool_calls": [CALL, {**CALL, "id": "call_2"}]}],
    "choices": [{"content": "one"}, {"content": "two"}],
    "reasoning": [{"content": "hm", "reasoning_content": "thinking", "refusal": None, "annotations": []}],
}


@pytest.mark.parametrize("messages", ANSWERS.values(), ids=ANSWERS)
def test_a_stream_and_a_plain_call_give_and_store_the_same(
    stage: Stage, messages: list[dict[str, Any]]
) -> None:
    answer = completion(*messages, service_tier="default")
    stage.endpoint.script.extend([answer, answer])
    plain = stage.post(n=len(messages)).json()
    assert plain == answer, "the whole answer, as the endpoint gave it"
    usage: Any = {"include_usage": True}
    with (
        stage.client() as client,
        client.chat.completions.stream(
            model="checker", messages=HELLO, n=len(messages), stream_options=usage
        ) as stream,
    ):
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        streamed = stream.get_final_completion()
    assert streamed.id == answer["id"]
    assert streamed.usage is not None
    assert streamed.usage.model_dump(exclude_none=True) == answer["usage"]
    assert len(chunks) > 2
    for choice, expected in zip(streamed.choices, answer["choices"], strict=True):
        assert choice.finish_reason == expected["finish_reason"]
        said = json.loads(choice.message.model_dump_json(exclude_none=True))
        for call in said.get("tool_calls", []):
            call["function"].pop("parsed_arguments", None)
            call.pop("index", None)
        assert said == {k: v for k, v in expected["message"].items() if v not in (None, [])}
    count = len(messages)
    first, second = stage.spans()[:count], stage.spans()[count:]
    for one, other in zip(first, second, strict=True):
        assert {**one.attributes, semconv.REQUEST_STREAM: True} == other.attributes


def test_models_are_listed_with_the_routed_names(stage: Stage) -> None:
    with stage.client() as client:
        assert [m.id for m in client.models.list().data] == ["policy", "checker", "keyless", "nobody"]
        assert client.models.retrieve("checker").id == "checker"
        with pytest.raises(openai.NotFoundError, match="which serves: policy, checker, keyless, nobody"):
            client.chat.completions.create(model="chequer", messages=HELLO)


# --- what is recorded ----------------------------------------------------------------------------


def test_an_answer_is_context_in_the_episode_and_no_transition(stage: Stage) -> None:
    stage.endpoint.script.append(
        completion({"content": None, "tool_calls": [CALL]}, finish_reason="tool_calls")
    )
    with stage.client() as client:
        client.chat.completions.create(model="checker", messages=HELLO, tools=[TOOL], temperature=0.5)  # type: ignore[list-item]
        client.chat.completions.create(model="policy", messages=HELLO, max_tokens=2)
    episode = stage.episode()
    hosted, own = episode.calls
    assert [t.span_id for t in episode.transitions] == [own.span_id]
    assert not episode.untrainable
    assert (hosted.policy, hosted.policy_version, hosted.prompt_ids, hosted.logprobs) == (None,) * 4
    assert hosted.output == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert (hosted.messages, hosted.tools, hosted.temperature) == (HELLO, [TOOL], 0.5)
    assert (hosted.model, hosted.response_id) == ("big-2026-01-01", "chatcmpl-hosted-1")
    assert (hosted.input_tokens, hosted.output_tokens, hosted.finish_reason) == (7, 5, "tool_calls")


def test_the_span_says_under_which_span_the_call_was_made(stage: Stage) -> None:
    stage.post()
    (span,) = stage.spans()
    assert (span.trace_id, span.parent_id) == ("a" * 32, "b" * 16)
    assert (span.scope, span.name) == (semconv.SCOPE_GATEWAY, "chat checker")
    assert (span.rollout_id, span.attempt_id) == (stage.rollout_id, f"{stage.rollout_id}-1")


def test_several_choices_are_several_spans_whose_tokens_count_once(stage: Stage) -> None:
    stage.endpoint.script.append(completion({"content": "one"}, {"content": "two"}))
    stage.post(n=2)
    assert [s.attributes[semconv.CHOICE_INDEX] for s in stage.spans()] == [0, 1]
    assert [s.attributes.get(semconv.USAGE_OUTPUT) for s in stage.spans()] == [5, None]


def test_an_answer_without_an_id_gets_one_to_be_found_by(stage: Stage) -> None:
    answer = completion({"content": "hi"})
    del answer["id"], answer["usage"], answer["choices"][0]["index"]
    stage.endpoint.script.append(answer)
    response = stage.post()
    (span,) = stage.spans()
    assert response.json()["id"].startswith("chatcmpl-")
    assert response.json()["id"] == response.headers["x-request-id"] == span.attributes[semconv.RESPONSE_ID]


def test_an_upstreams_answer_that_is_not_of_the_form_that_was_asked_for_is_seen_by_air(stage: Stage) -> None:
    schema = {"type": "object", "required": ["a"]}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    stage.endpoint.script.extend([completion({"content": '{"a": 1}'}), completion({"content": "a is 1"})])
    for _ in range(2):
        assert stage.post(response_format=asked).status_code == 200
    assert stage.post(response_format="as you like").status_code == 200  # for the endpoint to refuse
    episode = stage.episode()
    assert [call.response_schema for call in episode.calls] == [schema, schema, None]
    found = find_signals(episode, AIR())
    assert [(s.rule, s.call_span_id) for s in found.elsewhere] == [
        ("malformed_output", episode.calls[1].span_id)
    ]


# --- what goes wrong -----------------------------------------------------------------------------

TOO_MANY = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
REFUSALS: list[tuple[Refusal, int, str, str]] = [
    (Refusal(400, {"error": {"message": "no images", "code": "bad_image"}}), 400, "bad_image", "no images"),
    (Refusal(404, {"error": {"message": "no model big"}}), 404, "upstream_error", "no model big"),
    (Refusal(422, {"detail": "n is too large"}), 422, "upstream_error", "n is too large"),
    (Refusal(429, TOO_MANY), 429, "rate_limit_exceeded", "slow down"),
    (Refusal(400, b"\xff<html>"), 400, "upstream_error", "status 400"),
    (Refusal(401, {"error": {"message": f"bad key {SECRET}"}}), 502, "upstream_error", "CHECKER_KEY"),
    (Refusal(403, b""), 502, "upstream_error", "refused its key"),
    (Refusal(500, {"error": f"it broke, {SECRET}"}), 502, "upstream_error", r"it broke, \[key\]"),
    (Refusal(503, b""), 502, "upstream_error", "no explanation"),
    (Refusal(504, b""), 504, "upstream_error", "status 504"),
    (Refusal(302, b"", {"location": "http://127.0.0.1:9/"}), 502, "upstream_error", "status 302"),
    (Refusal(200, b"{"), 502, "upstream_error", "no chat completion"),
    (Refusal(200, {"choices": []}), 502, "upstream_error", "no chat completion"),
    (Refusal(200, {"choices": [{"message": None}]}), 502, "upstream_error", "no chat completion"),
    (Refusal(200, completion({"content": "x"}, usage=[1])), 502, "upstream_error", "no chat completion"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(("refusal", "status", "code", "sentence"), REFUSALS)
def test_a_refusal_is_told_with_the_upstreams_name_and_recorded(
    stage: Stage, refusal: Refusal, status: int, code: str, sentence: str, stream: bool
) -> None:
    stage.endpoint.script.append(refusal)
    with (
        stage.client() as client,
        pytest.raises(openai.APIStatusError, match=f"(?s)the upstream of 'checker'.*{sentence}") as caught,
    ):
        client.chat.completions.create(model="checker", messages=HELLO, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    (span,) = stage.spans()
    assert (span.status, span.attributes[semconv.ERROR_TYPE]) == (SpanStatus.ERROR, "UpstreamError")
    assert span.status_message in str(caught.value)
    assert SECRET not in str(caught.value) + caught.value.response.text + repr(span)
    assert not stage.episode().untrainable


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "inf"}, 86400),
        ({"retry-after": "later"}, None),
        ({}, None),
    ],
)
def test_how_long_to_wait_is_passed_on(stage: Stage, given: dict[str, str], seconds: float | None) -> None:
    stage.endpoint.script.append(Refusal(429, TOO_MANY, given))
    waits = stage.post().headers.get("retry-after-ms")
    assert (None if waits is None else float(waits) / 1000) == seconds


def test_a_date_to_wait_for_becomes_seconds(stage: Stage) -> None:
    until = formatdate(time.time() + 20, usegmt=True)
    stage.endpoint.script.append(Refusal(429, TOO_MANY, {"retry-after": until}))
    assert 10 < int(stage.post().headers["retry-after"]) <= 20


def test_an_endpoint_that_does_not_answer_in_time_is_a_504(stage: Stage) -> None:
    stage.endpoint.script.append(STALL)
    response = stage.post(model="keyless")
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "upstream_timeout"
    assert "gave no answer within 0.3 s" in response.json()["error"]["message"]
    assert [s.status for s in stage.spans()] == [SpanStatus.ERROR]


def test_an_endpoint_that_cannot_be_reached_is_a_502(stage: Stage) -> None:
    response = stage.post(model="nobody")
    assert response.status_code == 502
    assert "the upstream of 'nobody'" in response.json()["error"]["message"]
    assert [s.status for s in stage.spans()] == [SpanStatus.ERROR]


def test_a_client_that_leaves_ends_the_upstreams_request(stage: Stage) -> None:
    stage.endpoint.script.append(STALL)
    stage.endpoint.stalled.clear()
    stage.endpoint.left.clear()

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=stage.url, api_key=stage.server.key, max_retries=0) as client:
            asking = asyncio.create_task(client.chat.completions.create(model="checker", messages=HELLO))
            assert await asyncio.to_thread(stage.endpoint.stalled.wait, 10)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(leave())
    assert stage.endpoint.left.wait(10)
    wait_until(lambda: stage.rollout_id in {r.id for r in stage.server.store.rollouts()})
    (span,) = stage.spans()
    assert "disconnected" in span.status_message


def test_what_holds_for_policies_holds_for_upstreams(stage: Stage) -> None:
    """The key, the attempt's own rights, and the limit of a body."""
    stage.server.store.enqueue([rollout(id="mine", group_id="mine", status=RolloutStatus.QUEUED)])
    (claim,) = [c for c in stage.server.store.claim("w", 100) if c.rollout.id == "mine"]
    body: dict[str, Any] = {"model": "checker", "messages": HELLO}

    def status(url: str, key: str, **more: Any) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{url}/chat/completions", json={**body, **more}, headers=headers).status_code

    assert status(stage.url, "wrong") == 401
    assert status(stage.url, claim.key) == 403
    assert status(f"{stage.server.url}/v1", claim.key) == 200
    assert status(stage.url, stage.server.key, padding="x" * (21 * 2**20)) == 413
    assert [s.rollout_id for s in stage.server.store.spans("mine")] == ["mine"]
    assert len(stage.endpoint.received) == 1


def test_the_upstreams_key_is_nowhere_but_in_its_request(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    stage.endpoint.script.extend([Refusal(401, b""), completion({"content": "hi"})])
    seen = [stage.post(), stage.post(), stage.post(model="nobody")]
    shown = "".join(r.text + str(r.headers) for r in seen) + repr(stage.spans()) + caplog.text
    shown += repr(load_upstreams(_table(stage.server), {"CHECKER_KEY": SECRET}))
    assert SECRET not in shown


def _table(server: LocalServer) -> Path:
    assert server.store.path is not None
    return next(server.store.path.parent.glob("upstreams.json"))


# --- the table -----------------------------------------------------------------------------------

URL = "https://api.example.com/v1"


def test_a_table_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "upstreams.toml"
    file.write_text(
        f'[checker]\nurl = "{URL}/"\nmodel = "big"\nkey_env = "K"\ntimeout_s = 5\n["gpt-4.1"]\nurl = "{URL}"'
    )
    table = load_upstreams(file, {"K": f" {SECRET}\n"})
    assert (table["checker"].url, table["checker"].model, table["checker"].timeout_s) == (URL, "big", 5.0)
    assert table["checker"].key == SECRET
    assert (table["gpt-4.1"].model, table["gpt-4.1"].key) == ("gpt-4.1", None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "upstreams.json is not JSON"),
        ("[]", "must map model names"),
        ('{"c": "https://x"}', "upstream 'c' must have a url"),
        ('{"c": {}}', "url must be a base URL"),
        ('{"c": {"url": "ftp://x/v1"}}', "url must be a base URL"),
        ('{"c": {"url": "https://user:word@x/v1"}}', "without user"),
        ('{"c": {"url": "https://x:port/v1"}}', "url must be a base URL"),
        ('{"c": {"url": "https://x/v1?key=1"}}', "without user, query"),
        ('{"c": {"url": "https://x/v1/chat/completions"}}', "/chat/completions"),
        (f'{{"c": {{"url": "{URL}", "model": ""}}}}', "model must be the name"),
        (
            f'{{"c": {{"url": "{URL}", "key": "{SECRET}"}}}}',
            "unknown fields key: it takes url, model, key_env",
        ),
        (f'{{"c": {{"url": "{URL}", "key_env": 5}}}}', "key_env must be the name"),
        (f'{{"c": {{"url": "{URL}", "key_env": "NOT_SET"}}}}', "NOT_SET is not set"),
        (f'{{"c": {{"url": "{URL}", "key_env": "{SECRET}"}}}}', "that key_env names is not set"),
        (f'{{"c": {{"url": "{URL}", "timeout_s": 0}}}}', "timeout_s must be a number of seconds above zero"),
    ],
)
def test_a_mistake_in_the_table_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "upstreams.json"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=sentence) as caught:
        load_upstreams(file, {})
    assert SECRET not in str(caught.value)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read the upstreams in .*none\.toml"):
        load_upstreams(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["policy", "tiny"])
def test_a_routed_name_is_not_a_policys(tmp_path: Path, name: str) -> None:
    file = tmp_path / "upstreams.json"
    file.write_text(json.dumps({name: {"url": URL}}))
    engine = tiny_engine(tmp_path)
    settings = Settings(port=0, database=tmp_path / "store.db", upstreams=file)
    try:
        with (
            pytest.raises(InvalidInput, match=f"the upstream '{name}' has the name of a policy"),
            local_server(engine, settings),
        ):
            pass
    finally:
        engine.close()
