"""Chat messages -> prompt token ids, continuing recorded ids wherever a request extends an earlier call.

The chat template's rendering of the whole conversation is the reference. Where a request repeats the messages
and the answer of an earlier call of the same attempt, the prompt is that call's prompt and sampled ids plus
the template's text for what came after, so that nothing sampled is ever tokenised again. Where the template
rewrites history (its rendering up to the answer is no prefix of its rendering of the whole), the plain
rendering is used and counted in `fallbacks`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError

from agentlightning.errors import InvalidInput
from agentlightning.types import JsonObject, Message
from agentlightning_server.engines.base import ChatTokenizer
from agentlightning_server.gateway.toolcalls import (
    arguments_of,
    detect_format,
    renders_tools,
    tool_instructions,
)

MAX_CONVERSATIONS = 4096  # attempts remembered; the oldest are forgotten and then rendered plainly
MAX_CALLS = 256  # calls remembered per attempt

PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to sample from; `continued` when they extend recorded ids."""

    token_ids: Sequence[int]
    continued: bool = False


@dataclass(frozen=True, slots=True)
class _Call:
    """A recorded call, its messages in comparable form."""

    tools: str
    messages: tuple[object, ...]
    """The request's messages followed by the answer."""
    token_ids: tuple[int, ...]
    """Prompt and response."""


class PromptBuilder:
    """Renders prompts for one tokenizer and remembers what was sampled, per attempt. Thread-safe."""

    def __init__(
        self, tokenizer: ChatTokenizer, eos_ids: frozenset[int], *, continue_calls: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._continue_calls = continue_calls
        self._eos_ids = eos_ids | {tokenizer.eos_token_id}
        self._native_tools = renders_tools(tokenizer.chat_template)
        self.tool_format = detect_format(tokenizer.chat_template)
        self._calls: OrderedDict[str, list[_Call]] = OrderedDict()
        self._lock = threading.Lock()
        self.continued = 0
        self.fallbacks = 0

    def build(self, messages: Sequence[Message], tools: Sequence[JsonObject], attempt_id: str) -> Prompt:
        """Prompt ids for a request. Raises InvalidInput when the chat template refuses the messages."""
        whole = self._render(messages, tools, generation=True)
        call = self._extended(messages, tools, attempt_id)
        if call is not None:
            rest = self._after_answer(call, messages, tools, whole)
            if rest is not None:
                self.continued += 1
                return Prompt([*call.token_ids, *rest], continued=True)
            self.fallbacks += 1
        return Prompt(self._encode(whole))

    def record(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonObject],
        attempt_id: str,
        answer: Message,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
    ) -> None:
        """Remember a call, so that later requests of the attempt can continue it."""
        call = _Call(
            _comparable_tools(tools),
            tuple(_comparable(message) for message in [*messages, answer]),
            (*prompt_ids, *response_ids),
        )
        with self._lock:
            calls = self._calls.setdefault(attempt_id, [])
            self._calls.move_to_end(attempt_id)
            calls.append(call)
            del calls[:-MAX_CALLS]
            while len(self._calls) > MAX_CONVERSATIONS:
                self._calls.popitem(last=False)

    def forget(self, attempt_id: str) -> None:
        """Drop what is remembered of an attempt that has ended."""
        with self._lock:
            self._calls.pop(attempt_id, None)

    def decode(self, response_ids: Sequence[int]) -> str:
        """Response ids as text, without the end-of-turn token."""
        ids = list(response_ids)
        if ids and ids[-1] in self._eos_ids:
            ids.pop()
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def decode_token(self, token_id: int) -> str:
        """One token as text."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _extended(
        self, messages: Sequence[Message], tools: Sequence[JsonObject], attempt_id: str
    ) -> _Call | None:
        """The longest recorded call whose messages and answer start this request."""
        if not self._continue_calls:
            return None
        with self._lock:
            calls = list(self._calls.get(attempt_id, ()))
        if not calls:
            return None
        asked = tuple(_comparable(message) for message in messages)
        shown = _comparable_tools(tools)
        fitting = [
            call
            for call in calls
            if call.tools == shown and len(call.messages) < len(asked)
            if call.messages == asked[: len(call.messages)]
        ]
        return max(fitting, key=lambda call: len(call.messages), default=None)

    def _after_answer(
        self, call: _Call, messages: Sequence[Message], tools: Sequence[JsonObject], whole: str
    ) -> list[int] | None:
        """Ids of the template's text after the answer's end of turn; None when it rewrote history."""
        head = self._render(messages[: len(call.messages)], tools, generation=False)
        if not whole.startswith(head):
            return None
        ended = call.token_ids[-1] in self._eos_ids
        eos = self._tokenizer.decode([call.token_ids[-1]], skip_special_tokens=False) if ended else ""
        eos = eos or self._tokenizer.eos_token
        position = head.rfind(eos)
        if position < 0:
            return None
        rest = self._encode(whole[position + len(eos) :])
        return rest if ended else [self._tokenizer.eos_token_id, *rest]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _render(self, messages: Sequence[Message], tools: Sequence[JsonObject], *, generation: bool) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation}
        if self._tokenizer.chat_template is None:
            options["chat_template"] = PLAIN_CHATML
        if self._native_tools and tools:
            options["tools"] = list(tools)
        try:
            return str(self._tokenizer.apply_chat_template(self._for_template(messages, tools), **options))
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # of the template's own code
            raise InvalidInput(f"the model's chat template refuses these messages: {error}") from error

    def _for_template(self, messages: Sequence[Message], tools: Sequence[JsonObject]) -> list[dict[str, Any]]:
        """Messages as chat templates expect them, tools written out where the template cannot."""
        rendered = [self._message(message) for message in messages]
        if not tools or self._native_tools:
            return rendered
        text = tool_instructions(tools)
        if rendered[0]["role"] == "system":
            first = {**rendered[0], "content": f"{rendered[0]['content']}\n{text}"}
            return [first, *rendered[1:]]
        return [{"role": "system", "content": text}, *rendered]

    def _message(self, message: Message) -> dict[str, Any]:
        role = "system" if message["role"] == "developer" else str(message["role"])
        shown: dict[str, Any] = {"role": role, "content": content_text(message)}
        calls = cast("Sequence[Mapping[str, Any]]", message.get("tool_calls") or ())
        if not calls:
            return shown
        if self._native_tools:
            functions = [{"name": c["function"]["name"], "arguments": arguments_of(c)} for c in calls]
            shown["tool_calls"] = [{"type": "function", "function": f} for f in functions]
            return shown
        written = "".join(self.tool_format.render(c["function"]["name"], arguments_of(c)) for c in calls)
        shown["content"] += written
        return shown


def content_text(message: Message) -> str:
    """The text content of a chat message, its text parts joined."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = cast("Sequence[Mapping[str, Any]]", content or ())
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in parts)


def _comparable(message: Message) -> object:
    """What of a message counts for being the same: role, text, and the tool calls' names and arguments.

    Frameworks hand an answer back with null for empty content, other ids and stripped text.
    """
    calls = cast("Sequence[Mapping[str, Any]]", message.get("tool_calls") or ())
    requested = tuple((c["function"]["name"], repr(arguments_of(c))) for c in calls)
    return (message["role"], content_text(message).strip(), requested, message.get("tool_call_id"))


def _comparable_tools(tools: Sequence[JsonObject]) -> str:
    return repr(list(tools))
