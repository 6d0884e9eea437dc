"""Selectors: which calls train, by agent, by policy, by a predicate of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.episodes import episode, transition

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.learning import (
    Selector,
    select,
    select_agents,
    select_all,
    select_policies,
    selector_named,
)
from agentlightning.types import Episode, Transition

FLOW = episode(
    transition([1], [2], agent_name="writer", policy="writer", node_path="writer/model"),
    transition([3], [4], agent_name="checker", policy="checker", finish_reason="length"),
    transition([5], [6], agent_name="rewriter", policy="rewriter", finish_reason="length"),
)


def chosen(selector: Selector, flow: Episode = FLOW) -> list[str | None]:
    return [t.agent_name for t in select(flow, selector).transitions]


def was_cut(call: Transition) -> bool:
    """The predicate that tests name."""
    return call.finish_reason == "length"


def raises(call: Transition) -> bool:
    raise ZeroDivisionError(call.span_id)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("writer",), ["writer"]),
        (("*writer",), ["writer", "rewriter"]),
        (("writer", "checker"), ["writer", "checker"]),
        (("Writer",), []),
        ((), []),
    ],
)
def test_policies_are_selected_by_name(patterns: tuple[str, ...], expected: list[str]) -> None:
    assert chosen(select_policies(*patterns)) == expected


def test_selectors_join_as_and_does() -> None:
    assert chosen(select_all(select_agents("*writer"), was_cut)) == ["rewriter"]
    assert chosen(select_all()) == ["writer", "checker", "rewriter"]


def test_a_predicate_is_found_by_its_name(tmp_path: Path) -> None:
    assert chosen(selector_named("tests.core.test_learning_selection:was_cut")) == ["checker", "rewriter"]
    file = tmp_path / "choice_of_mine.py"
    file.write_text("def by_path(call):\n    return call.node_path == 'writer/model'\n")
    assert chosen(selector_named(f"{file}:by_path")) == ["writer"]


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("was_cut", "names no selector: write MODULE:FUNCTION"),
        ("no_such_module_here:f", "there is no module"),
        ("tests.core.test_learning_selection:was_cutt", "check the name of the selector function"),
        ("tests.core.test_learning_selection:FLOW", "is a Episode, not a function"),
    ],
)
def test_a_predicate_that_is_not_there_is_named(reference: str, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        selector_named(reference)


def test_what_a_predicate_raises_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        chosen(selector_named("tests.core.test_learning_selection:raises"))


def test_a_batch_holds_what_the_predicate_chose_and_weighs_it_as_one_episode() -> None:
    flow = episode(
        transition([1], [2, 3], agent_name="writer"),
        transition([4], [5, 6, 7], agent_name="checker"),
        transition([8], [9], agent_name="rewriter"),
    )
    other = episode(transition([1], [3], agent_name="writer"), final=0.0)
    batch = make_batch([flow, other], LearningSettings(select=select_agents("*writer")))
    assert batch.token_ids[batch.response_mask].tolist() == [2, 3, 9, 3]
    of_flow = batch.weights[batch.transition_index < 2].sum()  # context weighs nothing
    assert of_flow == pytest.approx(0.5), "the chosen calls of an episode share its whole weight"
    with pytest.raises(NothingToLearn, match="matches no call; agents seen: checker, rewriter, writer"):
        make_batch([flow, other], LearningSettings(select=select_policies("critic")))
