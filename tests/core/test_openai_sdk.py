# pyright: reportPrivateUsage=false
from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai._base_client import AsyncAPIClient, SyncAPIClient
from pydantic import BaseModel
from tests.adapters.recorded import recording
from tests.adapters.scripted_server import Request, ScriptedServer, fail, say

from agentlightning import openai_sdk, semconv
from agentlightning.context import ActiveRollout, use_rollout
from agentlightning.tracing import configure, trace

MESSAGES: Any = [{"role": "user", "content": "hi"}]


class Answer(BaseModel):
    a: int


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with recording() as running:
        openai_sdk.install("test")
        try:
            yield running
        finally:
            openai_sdk.uninstall("test")


def rollout(server: ScriptedServer, name: str = "r") -> ActiveRollout:
    return ActiveRollout(name, f"{name}-1", base_url=server.openai_url)


def client(server: ScriptedServer, **settings: Any) -> OpenAI:
    return OpenAI(
        base_url=server.openai_url, api_key="k", max_retries=settings.pop("max_retries", 0), **settings
    )


def plain(sdk: OpenAI) -> None:
    sdk.chat.completions.create(model="m", messages=MESSAGES)


def stream(sdk: OpenAI) -> None:
    assert list(sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True))


def parse(sdk: OpenAI) -> None:
    parsed = sdk.chat.completions.parse(model="m", messages=MESSAGES, response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(a=1)


def raw(sdk: OpenAI) -> None:
    sdk.chat.completions.with_raw_response.create(model="m", messages=MESSAGES, extra_headers={"x-mine": "1"})


async def async_plain(sdk: AsyncOpenAI) -> None:
    await sdk.chat.completions.create(model="m", messages=MESSAGES)


async def async_stream(sdk: AsyncOpenAI) -> None:
    async for _ in await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True):
        pass


def identity(request: Request) -> tuple[str | None, str | None, str | None]:
    headers = request.headers
    return (
        headers.get(semconv.HEADER_ROLLOUT),
        headers.get(semconv.HEADER_ATTEMPT),
        headers.get("traceparent"),
    )


@pytest.mark.parametrize("use", [plain, stream, parse, raw])
def test_a_request_says_its_rollout_attempt_and_span(
    server: ScriptedServer, use: Callable[[OpenAI], None]
) -> None:
    server.given(say('{"a": 1}'))
    with client(server) as sdk, use_rollout(rollout(server)), trace("task") as task:
        use(sdk)
    assert [identity(request) for request in server.requests] == [("r", "r-1", task.traceparent)]
    assert server.requests[0].headers["authorization"] == "Bearer k"
    if use is raw:
        assert server.requests[0].headers["x-mine"] == "1"


@pytest.mark.parametrize("use", [async_plain, async_stream])
def test_async_requests_of_two_rollouts_keep_apart(server: ScriptedServer, use: Any) -> None:
    async def one(sdk: AsyncOpenAI, name: str) -> None:
        with use_rollout(rollout(server, name)):
            await asyncio.sleep(0)
            await use(sdk)

    async def both() -> None:
        async with AsyncOpenAI(base_url=server.openai_url, api_key="k") as sdk:
            await asyncio.gather(one(sdk, "a"), one(sdk, "b"))

    asyncio.run(both())
    assert sorted(identity(request) for request in server.requests) == [
        ("a", "a-1", None),
        ("b", "b-1", None),
    ]


def test_a_thread_keeps_the_rollout_it_sets(server: ScriptedServer) -> None:
    def work(name: str) -> None:
        with client(server) as sdk, use_rollout(rollout(server, name)):
            plain(sdk)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(identity(request) for request in server.requests) == [
        ("a", "a-1", None),
        ("b", "b-1", None),
    ]


def test_each_retry_names_the_same_span(server: ScriptedServer) -> None:
    server.given(fail(429), say("ok"))
    with client(server, max_retries=1) as sdk, trace("task") as task:
        plain(sdk)
    assert [identity(request)[2] for request in server.requests] == [task.traceparent] * 2


def test_the_span_survives_an_instrumentation_of_the_http_client(server: ScriptedServer) -> None:
    def overwrite(request: Any) -> None:
        request.headers["traceparent"] = f"00-{'e' * 32}-{'f' * 16}-01"

    http_client = openai.DefaultHttpxClient(event_hooks={"request": [overwrite]})
    with client(server, http_client=http_client) as sdk, trace("task") as task:
        plain(sdk)
    assert server.requests[0].headers[semconv.HEADER_TRACEPARENT] == task.traceparent


def test_without_a_rollout_and_a_span_a_request_is_untouched(server: ScriptedServer) -> None:
    with client(server) as sdk:
        plain(sdk)
    assert identity(server.requests[0]) == (None, None, None)


def test_nothing_leaks_to_another_host(server: ScriptedServer) -> None:
    with ScriptedServer() as other, client(other) as sdk, use_rollout(rollout(server)), trace("task"):
        plain(sdk)
        assert identity(other.requests[0]) == (None, None, None)
    configure("")
    with client(server) as sdk, use_rollout(ActiveRollout("r", "r-1")):
        plain(sdk)  # no server is known: not even this one
    assert identity(server.requests[0]) == (None, None, None)


def test_an_absolute_url_of_another_host_gets_nothing(server: ScriptedServer) -> None:
    with ScriptedServer() as other, client(server) as sdk, use_rollout(rollout(server)):
        sdk.post(
            f"{other.openai_url}/chat/completions", cast_to=object, body={"model": "m", "messages": MESSAGES}
        )
        assert identity(other.requests[0]) == (None, None, None)


def test_uninstalling_restores_the_sdk_when_the_last_owner_goes() -> None:
    def hooks() -> list[object]:
        classes = (OpenAI, AsyncOpenAI, SyncAPIClient, AsyncAPIClient)
        return [client_class.__dict__["_prepare_options"] for client_class in classes]

    originals = hooks()
    assert openai_sdk.install("a")
    assert openai_sdk.install("b")
    openai_sdk.install("a")
    patched = hooks()
    assert patched[2:] != originals[2:]
    openai_sdk.uninstall("a")
    assert hooks() == patched
    openai_sdk.uninstall("b")
    openai_sdk.uninstall("b")
    assert hooks() == originals


def test_a_failure_of_the_patch_does_not_stop_the_request(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(url: str) -> dict[str, str]:
        raise RuntimeError("bug")

    monkeypatch.setattr(openai_sdk, "request_headers", broken)
    with client(server) as sdk, use_rollout(rollout(server)):
        plain(sdk)
    assert identity(server.requests[0]) == (None, None, None)


def test_the_sdk_of_this_environment_is_one_that_is_supported() -> None:
    assert (2, 45) <= tuple(int(part) for part in openai.__version__.split(".")[:2]) < (4, 0)
