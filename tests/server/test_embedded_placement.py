from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st
from tests.server.embedded_support import some_tokens

from agentlightning_server.engines.embedded.placement import (
    MIN_TRUNK,
    Sequenced,
    common_prefix,
    worthwhile_prefix,
)

tokens = st.lists(st.integers(0, 2), max_size=40)


@given(tokens, tokens)
def test_common_prefix_counts_equal_leading_tokens(a: list[int], b: list[int]) -> None:
    assert common_prefix(a, b) == sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    )


def reader(history: list[int], weight: int = 1, covered: int = 0) -> Sequenced:
    return Sequenced(history, weight, covered)


def test_the_prefix_that_saves_most_reads_is_chosen() -> None:
    system = some_tokens(0, 200)
    groups = [system + some_tokens(i, 30) for i in range(1, 5)]
    assert worthwhile_prefix([reader(group, 8) for group in groups]) == system


def test_requests_with_one_prompt_share_all_of_it() -> None:
    prompt = some_tokens(0, 100)
    assert worthwhile_prefix([reader(prompt, 8)]) == prompt


def test_short_or_unshared_prefixes_are_not_worth_it() -> None:
    short = some_tokens(0, MIN_TRUNK - 1)
    assert worthwhile_prefix([reader([*short, 1, 2]), reader([*short, 2, 2])]) is None
    assert worthwhile_prefix([reader(some_tokens(0, 300))]) is None


def test_a_longer_prefix_must_double_what_is_shared_already() -> None:
    system = some_tokens(0, 200)
    near = [reader(system + some_tokens(1, 80) + [i], 8, covered=200) for i in range(4)]
    assert worthwhile_prefix(near) is None
    document = system + some_tokens(1, 900)
    far = [reader([*document, i], 8, covered=200) for i in range(4)]
    assert worthwhile_prefix(far) == document
