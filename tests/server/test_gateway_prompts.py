from __future__ import annotations

import json
from typing import Any

import pytest

from agentlightning.errors import InvalidInput
from agentlightning.types import Message
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.gateway.prompts import PromptBuilder
from agentlightning_server.gateway.toolcalls import HERMES, LLAMA3_JSON, assistant_message, detect_format

EOS = 2
USER: Message = {"role": "user", "content": "What is 1 + 1?"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out an expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "title": "Expression"}},
            "required": ["expression"],
        },
    },
}
CALL_TEXT = '<tool_call>{"name":  "calculator", "arguments": {"expression": "1 + 1"}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_model(tmp_path_factory.mktemp("m")))  # pyright: ignore


@pytest.fixture
def prompts(tokenizer: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer, frozenset({EOS}))


def answered(prompts: PromptBuilder, text: str, tools: list[Any], messages: list[Message]) -> list[int]:
    """Record a call that answered with `text`; all its token ids."""
    prompt = prompts.build(messages, tools, "a").token_ids
    ids = [*prompts._tokenizer.encode(text, add_special_tokens=False), EOS]  # pyright: ignore
    answer = assistant_message(prompts.tool_format.parse(text))
    prompts.record(messages, tools, "a", answer, prompt, ids)
    return [*prompt, *ids]


def test_tools_are_written_out_for_a_template_that_knows_none(prompts: PromptBuilder) -> None:
    text = prompts.decode(prompts.build([USER], [TOOL], "a").token_ids)
    assert text.startswith("<|im_start|>system\nYou can call these functions:\n")
    assert '"name": "calculator"' in text
    assert "title" not in text
    assert text.endswith("What is 1 + 1?<|im_end|>\n<|im_start|>assistant\n")


def test_tools_join_the_agents_own_system_message(prompts: PromptBuilder) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}, USER]
    text = prompts.decode(prompts.build(messages, [TOOL], "a").token_ids)
    assert text.startswith("<|im_start|>system\nBe brief.\nYou can call")
    assert text.count("<|im_start|>system") == 1


def test_a_tool_call_goes_on_from_the_very_ids_that_were_sampled(prompts: PromptBuilder) -> None:
    """The model wrote two spaces where a rendering has one: the next prompt keeps the two."""
    so_far = answered(prompts, CALL_TEXT, [TOOL], [USER])
    returned: list[Message] = [
        USER,
        {
            "role": "assistant",
            "content": "",  # frameworks turn null into an empty string
            "tool_calls": [
                {
                    "id": "call_of_the_framework",
                    "type": "function",
                    "function": {"name": "calculator", "arguments": '{"expression":"1 + 1"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_of_the_framework", "content": "2"},
    ]
    prompt = prompts.build(returned, [TOOL], "a")
    assert prompt.continued
    assert list(prompt.token_ids)[: len(so_far)] == so_far
    rest = prompts.decode(list(prompt.token_ids)[len(so_far) :])
    assert rest == "\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.continued == 1


def test_a_canonical_answer_continues_to_the_reference_rendering(
    prompts: PromptBuilder, tokenizer: Any
) -> None:
    answered(prompts, "Two.", [], [USER])
    messages: list[Message] = [
        USER,
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
    ]
    continued = prompts.build(messages, [], "a").token_ids
    plain = PromptBuilder(tokenizer, frozenset({EOS})).build(messages, [], "a").token_ids
    assert list(continued) == list(plain)


def test_an_answer_cut_at_the_limit_is_closed_before_what_follows(prompts: PromptBuilder) -> None:
    prompt = prompts.build([USER], [], "a").token_ids
    cut = prompts._tokenizer.encode("Tw", add_special_tokens=False)  # pyright: ignore
    prompts.record([USER], [], "a", {"role": "assistant", "content": "Tw"}, prompt, cut)
    messages: list[Message] = [USER, {"role": "assistant", "content": "Tw"}, USER]
    following = list(prompts.build(messages, [], "a").token_ids)
    assert following[len(prompt) + len(cut)] == EOS


@pytest.mark.parametrize(("position", "text"), [(0, "What is 1 + 2?"), (1, "Three.")])
def test_a_changed_history_is_rendered_anew(prompts: PromptBuilder, position: int, text: str) -> None:
    answered(prompts, "Two.", [], [USER])
    messages: list[Message] = [USER, {"role": "assistant", "content": "Two."}, USER]
    messages[position] = {**messages[position], "content": text}
    assert not prompts.build(messages, [], "a").continued


def test_other_tools_or_another_attempt_do_not_continue(prompts: PromptBuilder) -> None:
    answered(prompts, "Two.", [], [USER])
    messages: list[Message] = [USER, {"role": "assistant", "content": "Two."}, USER]
    assert not prompts.build(messages, [TOOL], "a").continued
    assert not prompts.build(messages, [], "b").continued
    prompts.forget("a")
    assert not prompts.build(messages, [], "a").continued


def test_a_template_that_rewrites_history_falls_back_and_is_counted(tokenizer: Any) -> None:
    import copy

    other = copy.copy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    prompts = PromptBuilder(other, frozenset({EOS}))
    answered(prompts, "Two.", [], [USER])
    messages: list[Message] = [USER, {"role": "assistant", "content": "Two."}, USER]
    assert not prompts.build(messages, [], "a").continued
    assert prompts.fallbacks == 1


def test_a_template_that_refuses_the_messages_is_the_callers_error(tokenizer: Any) -> None:
    import copy

    other = copy.copy(tokenizer)
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidInput, match="roles must alternate"):
        PromptBuilder(other, frozenset({EOS})).build([USER], [], "a")


# --- reading tool calls --------------------------------------------------------------------------


def test_hermes_calls_are_read_with_the_text_around_them() -> None:
    parsed = HERMES.parse(f"Let me see. {CALL_TEXT}\n{CALL_TEXT}")
    assert parsed.content == "Let me see."
    assert [json.loads(str(c["function"]["arguments"])) for c in parsed.tool_calls] == [  # type: ignore[index]
        {"expression": "1 + 1"}
    ] * 2
    assert len({str(c["id"]) for c in parsed.tool_calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>calculator(1 + 1)</tool_call>",
        '<tool_call>{"name": "calculator"}</tool_call>',
        '<tool_call>{"name": "calculator", "arguments": "1 + 1"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 5000,
        f"{CALL_TEXT}<tool_call>oops",
    ],
)
def test_a_call_that_cannot_be_read_stays_text_and_is_reported(text: str) -> None:
    parsed = HERMES.parse(text)
    assert not parsed.tool_calls
    assert parsed.content == text
    assert parsed.malformed is not None


def test_llama_calls_are_read() -> None:
    one = '{"name": "calculator", "parameters": {"expression": "1 + 1"}}'
    assert len(LLAMA3_JSON.parse(one).tool_calls) == 1
    assert len(LLAMA3_JSON.parse(f"<|python_tag|>{one}; {one}").tool_calls) == 2
    assert LLAMA3_JSON.parse("Just text.").content == "Just text."
    assert LLAMA3_JSON.parse('{"name": "calculator", "parameters": 3}').malformed is not None


def test_the_format_follows_the_chat_template() -> None:
    assert detect_format("... <tool_call> ...") is HERMES
    assert detect_format("... Environment: ipython ...") is LLAMA3_JSON
    assert detect_format(None) is HERMES


def test_plain_text_is_left_alone() -> None:
    parsed = HERMES.parse("  two  ")
    assert (parsed.content, parsed.tool_calls, parsed.malformed) == ("  two  ", (), None)
    assert assistant_message(parsed) == {"role": "assistant", "content": "  two  "}
