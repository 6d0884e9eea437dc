from __future__ import annotations

import time
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from examples.calcx_math.calculator import evaluate, shown
from examples.calcx_math.data import load, split_by_story
from examples.calcx_math.reward import answer_correct, number_in, strict_reward

from agentlightning.types import Task


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 + 7", "19"),
        ("(1 + 2) * 3", "9"),
        ("7 / 2", "3.5"),
        ("-3 + 1", "-2"),
        ("2 ** 10", "1024"),
        ("7 % 4", "3"),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert shown(evaluate(expression)) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9**9",
        "__import__('os')",
        "1/0",
        "0 ** -1",
        "True + 1",
        "1e999",
        "(1",
        "",
        "x",
        "1 if 1 else 2",
        "9" * 500,
    ],
)
def test_the_calculator_refuses_everything_else_at_once(expression: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"\w"):
        evaluate(expression)
    assert time.monotonic() - began < 5


def test_a_tower_of_powers_cannot_run_away() -> None:
    with pytest.raises(ValueError, match="too large"):
        evaluate("(10 ** 64) ** 64")
    assert evaluate("10 ** 64") == Fraction(10**64)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("The answer is 24.", "24"),
        ("It was 99, no: ### ANSWER: 24 ### of 99", "24"),
        ("<result>24</result> 7", "24"),
        ("1,319", "1319"),
        ("$24", "24"),
        ("24 seconds", "24"),
        ("50%", "0.5"),
        ("0.66", "2/3"),
        ("2 1/3", "7/3"),
        ("C) 6", "C"),
        ("(b)", "B"),
        ("The answer is -3.", "-3"),
        ("170141183460469231731687303715884105728", "170141183460469231731687303715884105728"),
        ("1" + "0" * 50_000, "1" + "0" * 50_000),
        ("$1,319.00", "1319"),
        ("3_828", "3828"),
        ("3,828", "3_828"),
        ("1\u00a0319", "1319"),
        ("1{,}319", "1319"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("- 5", "-5"),
        ("x = -3", "-3"),
        ("x = 5", "5"),
        ("+5", "5"),
        ("50 percent", "1/2"),
        ("50\\%", "0.5"),
        ("0.5", "50%"),
        ("2 and 1/3", "7/3"),
        ("2½", "2.5"),
        ("-½", "-0.5"),
        ("\\frac{1}{2}", "0.5"),
        ("-\\dfrac{1}{2}", "-0.5"),
        ("2\\frac{1}{3}", "7/3"),
        ("so \\boxed{\\frac{1}{2}}, not 99", "1/2"),
        ("\\boxed{24\\text{ cm}}", "24"),
        ("#### 24", "24"),
        ("1.5e3", "1500"),
        ("1.5 × 10^3", "1500"),
        ("1.5 \\times 10^{3}", "1500"),
        ("3 million", "3000000"),
        ("USD 24", "24"),
        ("Rs.24", "24"),
        ("24 €", "24"),
        ("24/day", "24"),
        ("24 cm^3", "24"),
        ("24 m2", "24"),
        ("**24**", "24"),
        ("`24`", "24"),
        ("２４", "24"),
        ("12 + 12 = 24", "24"),
        ("### ANSWER: 12 + 12 = 24 ###", "24"),
        ("### ANSWER: 24", "24"),
        ("###answer:24###", "24"),
        ("### ANSWER: 1 ### no: ### ANSWER: **24** ###", "24"),
        ("<result>2/3 = around 0.666667</result>", "2/3"),
        ("### ANSWER: C) 6 ###", "C"),
        ("The answer is (c).", "C"),
        ("C", "C) 6"),
        ("12", "12 seconds"),
        ("24.0", "24"),
        (".5", "0.5"),
        ("3:4", "3:4"),
        ("Yes.", "yes"),
    ],
)
def test_right_answers_count(prediction: str, gold: str) -> None:
    assert answer_correct(prediction, gold)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("24.2", "24"),
        ("0.65", "2/3"),
        ("24 and then 25", "24"),
        ("9**9**9**9", "24"),
        ("", "24"),
        ("5-3", "-3"),
        ("1/0", "3"),
        ("170141183460469231731687303715884105729", "170141183460469231731687303715884105728"),
        ('__import__("os").getpid()*0+24+1', "24"),
        ("D", "C"),
        ("9" * 100_000, "9"),
        ("9" * 5000, "9" * 4999 + "8"),
        ("9**9**9**9", "9"),
        ("2*12", "24"),
        ("12*24", "24"),
        ("24+0", "24"),
        ("24/1", "25"),
        ('__import__("os").getpid()*0+24', "24"),
        ("5-3", "3"),
        ("5 - 3", "2"),
        ("24^2", "24"),
        ("1e999999999", "1"),
        ("1e9999999999999", "1"),
        ("3:24", "24"),
        ("1:4", "3:4"),
        ("H2O", "2"),
        ("24 cm^3", "3"),
        ("COVID-19", "19"),
        ("1.2.3", "3"),
        ("1/2/3", "1/2"),
        ("### ANSWER: 25 ### 24", "24"),
        ("### ANSWER: ### 24", "24"),
        ("<result></result>24", "24"),
        ("### ANSWER: 24 or 25 ###", "24"),
        ("\\boxed{25} 24", "24"),
        ("50%", "50"),
        ("50", "50%"),
        ("0.001", "0"),
        ("-24", "24"),
        ("C or D", "C"),
        ("A train goes", "A"),
        ("24", ""),
    ],
)
def test_wrong_answers_do_not(prediction: str, gold: str) -> None:
    assert not answer_correct(prediction, gold)


@pytest.mark.parametrize(
    "piece",
    [
        "9",
        " ",
        "- ",
        "1,",
        "1 1/",
        "### ANSWER:",
        "<result>",
        "\\boxed{",
        "\\frac{1",
        "**",
        "½",
        "(",
        "1 and ",
    ],
)
def test_a_huge_answer_takes_time_in_proportion(piece: str) -> None:
    began = time.process_time()
    answer_correct(piece * (200_000 // len(piece)), "24")
    assert time.process_time() - began < 10


def conversation(results: list[tuple[str, bool]], final: str) -> list[Any]:
    """Messages as AutoGen returns them, by type name."""
    event = type("ToolCallExecutionEvent", (SimpleNamespace,), {})
    text = type("TextMessage", (SimpleNamespace,), {})
    content = [SimpleNamespace(content=c, is_error=e) for c, e in results]
    return [event(content=content), text(content=final)]


def test_the_strict_reward_needs_the_tool_to_have_said_it() -> None:
    assert strict_reward(conversation([("24", False)], "The answer is 24."), "24") == 1.0
    assert strict_reward(conversation([("-24", False)], "The answer is 24."), "24") == 0.0
    assert strict_reward(conversation([("24", True)], "The answer is 24."), "24") == 0.0
    assert strict_reward(conversation([("24", False)], "The answer is 25."), "24") == 0.0
    assert strict_reward(conversation([], "The answer is 24."), "24") == 0.0


def task(number: int, question: str) -> Task:
    return Task(str(number), {"question": question, "answer": "1"})


def test_one_story_never_stands_on_both_sides() -> None:
    stories = ["{} had {} pens and lost {} of them today.", "A {} train left at {} and came at {} sharp."]
    tasks = [task(i, stories[i % 2].format("Tom" if i % 4 else "Ann", i, i + 1)) for i in range(20)]
    train, test = split_by_story(tasks, 10)
    assert {int(t.id) % 2 for t in train}.isdisjoint({int(t.id) % 2 for t in test})
    assert len(test) == 10


def test_the_sample_needs_no_download_and_its_answers_are_right() -> None:
    problems = load("sample", held_out=120)
    assert len(problems.held_out) == 120
    assert {t.id for t in problems.train}.isdisjoint({t.id for t in problems.held_out})
    for one in [*problems.train, *problems.held_out]:
        assert isinstance(one.input, dict)
        assert number_in(str(one.input["answer"])) is not None


def test_without_data_and_network_the_sample_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> tuple[str, str]:
        raise OSError(f"no route to host for {name}")

    monkeypatch.setattr("examples.calcx_math.data._fetch", unreachable)
    problems = load("easy", held_out=10)
    assert "generated sample" in problems.source
    assert "no route to host" in problems.source
