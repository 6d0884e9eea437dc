"""Numbers and option letters as people write them in answers, read without executing anything.

A number that is part of arithmetic (`12 * 24`), of a word (`H2O`, `cm^3`), of a ratio or of a time is no
answer. Every pattern here takes time in proportion to the text, and no number grows beyond what was written.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

MAX_DIGITS = 100_000  # of a whole number; a longer one is no answer
MAX_PART_DIGITS = 400  # of a fraction or a decimal, whose arithmetic takes longer
PIECE = 4000  # digits that Python reads at once

_DIGITS = r"(?:\d{1,3}(?:[,_]\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|(?<![\w.])\.\d+)"
_NUMBER = re.compile(
    rf"""(?: (?P<whole>{_DIGITS})(?:[ ]|[ ]and[ ])(?P<top>\d+)[ ]?/[ ]?(?P<bottom>\d+)      # 2 1/3
      | (?P<over>{_DECIMAL})[ ]?/[ ]?(?P<under>{_DECIMAL})                                  # 7/3
      | (?P<plain>{_DECIMAL}) (?:[eE](?P<e>[+-]?\d{{1,3}})(?!\d)
          | [ ]?(?:×|x|\*|·|\\times|\\cdot)[ ]?10[ ]?(?:\^|\*\*)\{{?(?P<power>[+-]?\d{{1,3}})\}}?(?!\d))? )
    [ ]?(?:(?P<percent>%|percent\b|per[ ]cent\b)|(?P<scale>thousand|million|billion|trillion)\b)?""",
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCY = "$€£¥₹"
_CURRENCY_CODE = re.compile(r"(?:\b(?:USD|EUR|GBP|CNY|RMB|INR|JPY|US|Rs\.?))$", re.IGNORECASE)
_LOOK = 8  # characters before and after a number that say what it is
_FOLLOWS = re.compile(
    r"[ ]?(?:\*\*|[*^×·][ ]?[\w(.$-]|/[ ]?[\d(.$-]|[+-][ ]?[\d(.$]|:\d)|[.,]\d|e[+-]?\d|[+-][a-z]\b",
    re.IGNORECASE,
)

_FRACTION = re.compile(r"\\[dtc]?frac[ ]?(?:\{([^{}]{1,99})\}[ ]?\{([^{}]{1,99})\}|(\d)(\d))")
_REWRITES = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle)\b"), ""),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]{0,99})\}"), r" \1 "),
    (re.compile(r"\\([%$])"), r"\1"),
    (
        re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))"),
        ",",
    ),  # 1 319 with the spaces that do not break
    (re.compile(r"(?<![\w)*])(\*{1,3}|_{1,3})(?=[^\s*_])([^*_\n]{1,99})\1(?![\w(*])"), r" \2 "),  # **24**
    (re.compile(r"\s"), " "),
)
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "﹣": "-", "⁄": "/", "∕": "/", "÷": "/"})


def plain(text: str) -> str:
    """The text with typography and LaTeX in plain characters: −½ and -\\frac{1}{2} become -1/2."""
    text = "".join(map(_plain_character, text)) if not text.isascii() else text
    text = text.translate(_CHARACTERS)
    text = _FRACTION.sub(_as_fraction, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _plain_character(character: str) -> str:
    if "！" <= character <= "～":
        return unicodedata.normalize("NFKC", character)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character)
    return character


def _as_fraction(match: re.Match[str]) -> str:
    top, bottom = (match[1], match[2]) if match[1] else (match[3], match[4])
    after_digit = match.string[match.start() - 1 : match.start()].isdigit()
    return f"{' ' * after_digit}{top.strip()}/{bottom.strip()}"


def numbers_in(text: str) -> Iterator[tuple[Fraction, re.Match[str]]]:
    """The numbers of a plain text that can be an answer, with their places; the last one first."""
    for match in reversed(list(_NUMBER.finditer(text))):
        negative = _sign(text, match)
        value = None if negative is None or _goes_on(text, match.end()) else _value(match)
        if value is not None:
            yield (-value if negative else value), match


def _sign(text: str, match: re.Match[str]) -> bool | None:
    """Whether the number is negative; None when it is part of something else."""
    before = text[max(0, match.start() - _LOOK) : match.start()]
    near = before.rstrip(" ")
    if near[-1:] in _CURRENCY and near:
        before, near = near[:-1], near[:-1].rstrip(" ")
    elif code := _CURRENCY_CODE.search(near):
        before, near = near[: code.start()], near[: code.start()].rstrip(" ")
    if near.endswith(("-", "+")):
        left = near[:-1]
        touching, operand = left[-1:], left.rstrip(" ")[-1:]
        if touching.isalnum() or operand.isdigit() or (operand and operand in ")%-+*/×·"):
            return None  # 5-3, 5 - 3, COVID-19
        apart = before.endswith(" ")
        if apart and operand and operand not in "=(:≈~,":
            return False  # a dash between words
        return near[-1] == "-"
    if near.endswith(("*", "/", "^", "×", "·", "\\", "^{", "_{")):
        return None
    if before[-1:].isalpha() or before[-1:] == "_":
        return None  # H2O, x2
    return None if re.search(r"\d[:.]$", before) else False  # 3:45, 1.2.3


def _goes_on(text: str, end: int) -> bool:
    """Whether arithmetic, a ratio or a longer number follows."""
    return _FOLLOWS.match(text[end : end + _LOOK]) is not None


def _value(match: re.Match[str]) -> Fraction | None:
    try:
        if match["whole"]:
            value = _read(match["whole"]) + _ratio(match["top"], match["bottom"])
        elif match["over"]:
            value = _ratio(match["over"], match["under"])
        else:
            value = _read(match["plain"]) * Fraction(10) ** int(match["e"] or match["power"] or 0)
    except (ValueError, ZeroDivisionError):
        return None
    if match["percent"]:
        return value / 100
    return value * _SCALES[match["scale"].lower()] if match["scale"] else value


def _ratio(top: str, bottom: str) -> Fraction:
    if max(len(top), len(bottom)) > MAX_PART_DIGITS:
        raise ValueError("too many digits")
    return _read(top) / _read(bottom)


def _read(digits: str) -> Fraction:
    digits = digits.replace(",", "").replace("_", "")
    if "." in digits:
        if len(digits) > MAX_PART_DIGITS:
            raise ValueError("too many digits")
        return Fraction(digits)
    if len(digits) > MAX_DIGITS:
        raise ValueError("too many digits")
    value = 0
    for start in range(0, len(digits), PIECE):
        piece = digits[start : start + PIECE]
        value = value * 10 ** len(piece) + int(piece)
    return Fraction(value)


# --- option letters ------------------------------------------------------------------------------

_ONLY_LETTER = re.compile(r"[\s(\[{*]*([A-Za-z])[\s)\]}.:*]*")
_LEADING_LETTER = re.compile(r"\s{0,9}[(\[]?([A-Za-z])[).:\]]")
_NAMED_LETTER = re.compile(
    r"\b(?:answer|option|choice)\b(?: is| would be)?[ :]{0,3}(?:option |choice )?"
    r"[(\[*]{0,3}([A-Za-z])\b(?![ '][a-z])",
    re.IGNORECASE,
)


def letter_in(text: str) -> str | None:
    """The option that a text chooses, as a capital letter: "C", "(c)", "C) 6", "The answer is C."."""
    match = _ONLY_LETTER.fullmatch(text) or _LEADING_LETTER.match(text)
    for named in () if match else _NAMED_LETTER.finditer(text):
        match = named
    return match[1].upper() if match else None
