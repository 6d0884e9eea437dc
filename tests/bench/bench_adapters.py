# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What recording costs an agent: CPU time added per model call, by adapter and tracer; time to import.

The models answer from memory, so the difference between an agent with and without the adapter is the adapter.
Both are run in turn and the median of the differences counts, for the machine's noise is larger than what is
measured. CPU time is that of the whole process, the sending of the spans included; `*_inline_us` is what the
agent's own thread waits for. The bare handler of LangChain only keeps the values: a yardstick.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, Final

from autogen_core.models import ModelInfo, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from openai.types.chat import ChatCompletion

import agentlightning_autogen
from agentlightning.tracing import configure, get_tracer
from agentlightning_langchain import LightningCallbackHandler

ROUNDS: Final = 15
CALLS: Final = 100
QUESTION: Final = "How many apples are left when Ann eats two of her seven apples? " * 8
INFO: Final = ModelInfo(
    vision=False, function_calling=True, json_output=True, family="unknown", structured_output=False
)
ADD: Final = {"name": "add", "arguments": '{"a": 7, "b": -2}'}

_SINK: Final = """
import http.server, os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # ends with its parent
class Sink(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *a): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def run() -> dict[str, float]:
    """Microseconds added per model call, and milliseconds to import."""
    results = {"import_agentlightning_ms": import_ms("agentlightning")}
    results["import_tracing_ms"] = import_ms("agentlightning.tracing, agentlightning.rewards")
    results["langchain_bare_handler_us"] = langchain_us(KeepsValues())[0]
    with span_sink() as url:
        for tracer in ("light", "otel"):
            configure(url, tracer=tracer)
            for name, added in (
                (f"langchain_{tracer}", langchain_us(LightningCallbackHandler())),
                (f"autogen_{tracer}", autogen_us()),
            ):
                results[f"{name}_us"], results[f"{name}_inline_us"] = added
            assert get_tracer().dropped == 0
        configure("")
    return results


@contextlib.contextmanager
def span_sink() -> Generator[str]:
    """A server in another process that takes spans and forgets them."""
    command = [sys.executable, "-c", _SINK]
    pipe: Any = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


def import_ms(names: str) -> float:
    """Median time of importing in a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); import {names}; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(7)
    ]
    return round(1e3 * statistics.median(times), 1)


def added_us(without: Callable[[], object], with_it: Callable[[], object]) -> tuple[float, float]:
    """Microseconds per call that `with_it` takes more: of the process's CPU, and of this thread's."""
    for work in (without, with_it):
        work()
    differences: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        plain, recorded = _cpu(without), _cpu(with_it)
        differences.append((recorded[0] - plain[0], recorded[1] - plain[1]))
    total, inline = (statistics.median(column) for column in zip(*differences, strict=True))
    return round(1e6 * total / CALLS, 1), round(1e6 * inline / CALLS, 1)


def _cpu(work: Callable[[], object]) -> tuple[float, float]:
    process, thread = time.process_time(), time.thread_time()
    work()
    inline = time.thread_time() - thread
    get_tracer().flush(30)
    return time.process_time() - process, inline


class KeepsValues(BaseCallbackHandler):
    """The least that a handler can do."""

    run_inline = True

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.kept.append((messages, kwargs))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.kept.append((response, kwargs))


def langchain_us(handler: BaseCallbackHandler) -> tuple[float, float]:
    """A chat model with tools and a short history, invoked with and without the handler."""
    answer = AIMessage(
        "Five apples are left.", response_metadata={"id": "chatcmpl-1", "finish_reason": "stop"}
    )
    answer.usage_metadata = {"input_tokens": 100, "output_tokens": 6, "total_tokens": 106}
    model = FakeMessagesListChatModel(responses=[answer])
    asked = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 7, "b": -2}, "id": "c1"}])
    messages = [SystemMessage("You are good at sums."), HumanMessage(QUESTION), asked, HumanMessage("And?")]
    config: Any = {"callbacks": [handler]}

    def repeat(given: Any) -> None:
        for _ in range(CALLS):
            model.invoke(messages, config=given)

    return added_us(lambda: repeat(None), lambda: repeat(config))


def autogen_us() -> tuple[float, float]:
    """The OpenAI-compatible client, with its HTTP request replaced, instrumented and not."""
    client: Any = OpenAIChatCompletionClient(
        model="m", base_url="http://127.0.0.1:1/v1", api_key="k", model_info=INFO
    )
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "Five apples are left."},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 6, "total_tokens": 106}
    completion = ChatCompletion.model_validate(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
    )

    async def answer(**_: Any) -> ChatCompletion:
        return completion

    client._client.chat.completions.create = answer
    messages = [UserMessage(content=QUESTION, source="user"), UserMessage(content="And?", source="user")]

    async def repeat() -> None:
        for _ in range(CALLS):
            await client.create(messages)

    def recorded() -> None:
        agentlightning_autogen.instrument()
        asyncio.run(repeat())
        agentlightning_autogen.uninstrument()

    return added_us(lambda: asyncio.run(repeat()), recorded)


if __name__ == "__main__":
    for key, value in run().items():
        print(f"{key:32} {value}")
