"""How good an answer is. Nothing of the model's text is ever executed.

`strict_reward` counts a right answer only when a tool returned it: graded on the text alone, a policy that
subtracts in order of mention and drops the minus sign scores up to 16 points too well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

RELATIVE_TOLERANCE = Fraction(1, 100)  # of decimal answers; whole numbers must be exact
MAX_DIGITS = 400  # a longer number is no answer

_MARKED = re.compile(r"###\s*ANSWER:\s*(.+?)\s*###|<result>(.+?)</result>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(
    r"""(?P<sign>-?)\s*\$?\s*
    (?: (?P<whole>\d+)\s+(?P<top>\d+)/(?P<bottom>\d+)       # 2 1/3
      | (?P<num>\d[\d,]*(?:\.\d+)?|\.\d+)\s*/\s*(?P<den>\d[\d,]*(?:\.\d+)?)   # 7/3
      | (?P<plain>\d[\d,]*(?:\.\d+)?|\.\d+) )
    \s*(?P<percent>%?)""",
    re.VERBOSE,
)


def answer_correct(prediction: str, gold: str) -> bool:
    """Whether the answer in `prediction` is `gold`.

    A marked answer (### ANSWER: 24 ###, <result>24</result>) wins over other numbers; else the last number of
    the text counts. Numbers, fractions, mixed numbers, percents, thousands separators and units are read.
    Whole-number golds must be met exactly, others within 1 %. A gold that is an option letter is compared as
    a letter.
    """
    marked = _MARKED.findall(prediction)
    text = "".join(marked[-1]) if marked else prediction
    wanted = number_in(gold)
    if wanted is None:
        return _letter(text) == _letter(gold) is not None or text.strip().lower() == gold.strip().lower()
    found = number_in(text)
    return found is not None and same_number(found, wanted)


def same_number(found: Fraction, wanted: Fraction) -> bool:
    """Exact for whole numbers, within 1 % of `wanted` otherwise."""
    if wanted.denominator == 1:
        return found == wanted
    return abs(found - wanted) <= RELATIVE_TOLERANCE * abs(wanted)


def number_in(text: str) -> Fraction | None:
    """The last number of a text, None without one."""
    last = max(_NUMBER.finditer(text), key=lambda match: match.start(), default=None)
    if last is None or len(last.group()) > MAX_DIGITS:
        return None
    value = _read(last)
    if value is None:
        return None
    before = text[last.start() - 1 : last.start()]
    negative = last["sign"] == "-" and not (before.isalnum() or before == ")")
    value = value / 100 if last["percent"] else value
    return -value if negative else value


def _read(match: re.Match[str]) -> Fraction | None:
    try:
        if match["whole"]:
            return int(match["whole"]) + Fraction(int(match["top"]), int(match["bottom"]))
        if match["num"]:
            return Fraction(match["num"].replace(",", "")) / Fraction(match["den"].replace(",", ""))
        return Fraction(match["plain"].replace(",", ""))
    except ZeroDivisionError:
        return None


def _letter(text: str) -> str | None:
    match = re.fullmatch(r"[\s(\[]*([A-Za-z])[\s)\].:]*", text) or re.match(r"\s*\(?([A-Ea-e])[).:]\s", text)
    return match.group(1).upper() if match else None


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
