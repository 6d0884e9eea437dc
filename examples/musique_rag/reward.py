"""How good an answer is: 0.9 of its token F1 and 0.1 of its form.

`answer_f1` is the answer F1 of MuSiQue's official evaluator (evaluate_v1.0.py; SQuAD's, with the best of the
gold answers). A transcript's answer is what it says between <answer> and </answer>; without them it has none.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from agentlightning.errors import InvalidInput

F1_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def answer_f1(prediction: str, golds: Sequence[str]) -> float:
    """Token F1 with the gold answer or alias that fits best; 1 when both say nothing."""
    if isinstance(golds, str) or not golds:
        raise InvalidInput(f"golds must be a list of at least one answer, got {golds!r}")
    return max(_f1(_tokens(prediction), _tokens(gold)) for gold in golds)


def format_score(transcript: str | Sequence[Any]) -> float:
    """1.0 when the transcript ends in one answer in its tags, else 0.0.

    A transcript is the agent's text, or the messages of its conversation, of which the last counts.
    """
    return 0.0 if answer_of(transcript) is None else 1.0


def reward(transcript: str | Sequence[Any], golds: Sequence[str]) -> float:
    """0.9 · F1 of the tagged answer + 0.1 · format."""
    answer = answer_of(transcript)
    if answer is None:
        return 0.0
    return F1_WEIGHT * answer_f1(answer, golds) + FORMAT_WEIGHT


def answer_of(transcript: str | Sequence[Any]) -> str | None:
    """What stands between the tags; None unless there is exactly one pair with something in it."""
    text = transcript if isinstance(transcript, str) else _last_text(transcript)
    tags = list(_TAG.finditer(text))
    if [tag[1] for tag in tags] != ["", "/"]:
        return None
    return text[tags[0].end() : tags[1].start()].strip() or None


def _last_text(messages: Sequence[Any]) -> str:
    """The text of the last message, when the agent said it."""
    if not messages:
        return ""
    last = messages[-1]
    if isinstance(last, str):
        return last
    if _field(last, "role", "assistant") != "assistant":
        return ""
    content = _field(last, "content", None) or ""
    return content if isinstance(content, str) else "".join(_field(part, "text", "") for part in content)


def _field(message: Any, name: str, default: Any) -> Any:
    """Of a message as a mapping or as an object."""
    return message.get(name, default) if isinstance(message, Mapping) else getattr(message, name, default)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    same = sum((Counter(predicted) & Counter(gold)).values())
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def _tokens(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
