"""How good an answer is. Nothing of the model's text is ever executed.

`strict_reward` counts a right answer only when a tool returned it: graded on the text alone, a policy that
subtracts in order of mention and drops the minus sign scores up to 16 points too well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from examples.calcx_math.answers import letter_in, numbers_in, plain

RELATIVE_TOLERANCE = Fraction(1, 100)  # of decimal answers; whole numbers must be exact

_MARK = re.compile(
    r"###\s{0,9}ANSWER\s{0,9}:|<result>|\\boxed\s?\{|(?<![^\s])####(?=\s{0,9}\S)", re.IGNORECASE
)


def answer_correct(prediction: str, gold: str) -> bool:
    """Whether the answer in `prediction` is `gold`.

    A marked answer (### ANSWER: 24 ###, <result>24</result>, \\boxed{24}, #### 24) wins over everything else,
    the last of several; without one, the last number of the text counts. Read are numbers, fractions, mixed
    numbers, percents, powers of ten, thousands separators, signs, currencies and units, in plain text or
    LaTeX. Whole-number golds must be met exactly, others within 1 %. A gold that is an option letter is
    compared as a letter, any other as text.
    """
    marked = marked_answer(prediction)
    text = prediction if marked is None else marked
    if text.strip() == gold.strip():
        return bool(text.strip())
    wanted = _whole_number(gold)
    if wanted is not None:
        found = number_in(text) if marked is None else _only_number(text)
        return found is not None and same_number(found, wanted)
    letter = letter_in(gold)
    if letter is not None:
        return letter_in(text) == letter
    return _words(text) == _words(gold) != ""


def marked_answer(text: str) -> str | None:
    """What the last marked answer says, up to its end mark or the end of its line; None without a mark."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    mark = marks[-1]
    inside = text[mark.end() :]
    if mark.group().startswith("\\"):
        return inside[: _closing_brace(inside)]
    if mark.group().startswith("<"):
        return re.split(r"</?result>", inside, maxsplit=1, flags=re.IGNORECASE)[0]
    return re.split(r"###|\n", inside.lstrip(), maxsplit=1)[0]


def _closing_brace(text: str) -> int:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return i
    return len(text)


def same_number(found: Fraction, wanted: Fraction) -> bool:
    """Exact for whole numbers, within 1 % of `wanted` otherwise."""
    if wanted.denominator == 1:
        return found == wanted
    return abs(found - wanted) <= RELATIVE_TOLERANCE * abs(wanted)


def number_in(text: str) -> Fraction | None:
    """The last number of a text that can be an answer, None without one."""
    return next((value for value, _ in numbers_in(plain(text))), None)


def _only_number(text: str) -> Fraction | None:
    """The number of a marked answer: what it comes to where it has an =, and None for a choice of several."""
    for part in reversed(re.split(r"[=≈]", plain(text))):
        if values := {value for value, _ in numbers_in(part)}:
            return values.pop() if len(values) == 1 else None
    return None


def _whole_number(gold: str) -> Fraction | None:
    """The value of a gold that is one number, perhaps with a unit; None for "C", "3:4" or "1 and 2"."""
    text = plain(gold).strip()
    found = list(numbers_in(text))
    if len(found) != 1:
        return None
    value, match = found[0]
    start = text[: match.start()].strip(" -+(" + "$€£¥₹")
    rest = text[match.end() :]
    return value if not start.strip() and not re.search(r"\d", re.sub(r"[A-Za-z]\^?\d", "", rest)) else None


def _words(text: str) -> str:
    """A text for comparison: lower case, single spaces, without the point at its end."""
    return re.sub(r"\s+", " ", text).strip(" .").casefold()


def strict_reward(messages: Sequence[Any], gold: str) -> float:
    """1.0 when the last message answers `gold` and one of the agent's tool results is that very number.

    `messages` are those of an AutoGen TaskResult.
    """
    wanted = number_in(gold)
    results = [
        result.content
        for message in messages
        if type(message).__name__ == "ToolCallExecutionEvent"
        for result in message.content
        if not result.is_error
    ]
    numbers = [number_in(result) for result in results]
    returned = wanted is not None and any(n is not None and same_number(n, wanted) for n in numbers)
    final = messages[-1]
    said = type(final).__name__ == "TextMessage" and answer_correct(str(final.content), gold)
    return 1.0 if returned and said else 0.0
