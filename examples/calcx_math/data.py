"""Word problems: SVAMP and GSM8K from `../shared/data/calcx`, else the public hub, else a small sample.

SVAMP (Patel et al., 2021) and GSM8K (Cobbe et al., 2021) are MIT-licensed; neither is part of this
repository. Problems that tell the same story with other numbers never stand on both sides of the split: a
random split leaks for a third of SVAMP's one-step problems.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentlightning import Task
from examples.calcx_math.calculator import evaluate, shown
from examples.downloads import download

Subset = Literal["easy", "one-step", "svamp", "gsm8k", "sample"]
HERE = Path(__file__).parent
SHARED = HERE.parents[1].parent / "shared" / "data" / "calcx"
HUB = {  # address and SHA-256
    "svamp.json": (
        "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/SVAMP.json",
        "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
    ),
    "gsm8k_train.jsonl": (
        "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    "gsm8k_test.jsonl": (
        "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
}
NOTICE = "SVAMP (Patel et al., 2021) and GSM8K (Cobbe et al., 2021) are MIT-licensed."
SPLIT_SEED = 1234
SAME_STORY = 0.8  # Jaccard similarity of the words, numbers and names masked


@dataclass(frozen=True, slots=True)
class Problems:
    """Training and held-out problems, and where they came from."""

    train: Sequence[Task]
    held_out: Sequence[Task]
    source: str


def load(subset: Subset = "easy", *, held_out: int = 120) -> Problems:
    """Problems of a subset, split by story with a fixed seed. Each task's input is {"question", "answer"}.

    "easy": SVAMP problems with one operation and no number but its two; "one-step": with one operation;
    "svamp": all of SVAMP; "gsm8k": its own train and test
    files; "sample": the generated problems that need no download. Without a network any subset falls back to
    the sample, and `source` says so.
    """
    if subset == "sample":
        return _sample(held_out)
    try:
        if subset == "gsm8k":
            return _gsm8k(held_out)
        return _svamp(held_out, subset)
    except OSError as error:
        problems = _sample(held_out)
        return Problems(
            problems.train, problems.held_out, f"{problems.source} ({subset} unavailable: {error})"
        )


def _fetch(name: str) -> tuple[str, str]:
    """(text, source) of a data file."""
    if (SHARED / name).exists():
        return (SHARED / name).read_text(encoding="utf-8"), "shared data"
    url, sha256 = HUB[name]
    file = download(url, sha256, HERE / ".data" / name, notice=NOTICE)
    return file.read_text(encoding="utf-8"), url


def _svamp(held_out: int, subset: Subset) -> Problems:
    text, source = _fetch("svamp.json")
    rows = json.loads(text)
    if subset != "svamp":
        rows = [row for row in rows if len(re.findall(r" [-+*/] ", row["Equation"])) == 1]
    tasks = [_svamp_task(row) for row in rows]
    if subset == "easy":
        tasks = [task for task in tasks if len(re.findall(r"\d+", question_of(task))) == 2]
    train, test = split_by_story(tasks, held_out)
    return Problems(train, test, f"SVAMP, {source}")


def question_of(task: Task) -> str:
    """The text of a problem."""
    assert isinstance(task.input, Mapping)
    return str(task.input["question"])


def _svamp_task(row: dict[str, Any]) -> Task:
    body = row["Body"].strip()
    end = "" if body[-1] in ".?!," else ("," if row["Question"][0].islower() else ".")
    question = re.sub(r"\s+", " ", f"{body}{end} {row['Question'].strip()}")
    answer = shown(evaluate(str(row["Answer"])))
    return Task(str(row["ID"]), {"question": question, "answer": answer})


def _gsm8k(held_out: int) -> Problems:
    train, source = _fetch("gsm8k_train.jsonl")
    test, _ = _fetch("gsm8k_test.jsonl")
    return Problems(_gsm8k_tasks(train, "train"), _gsm8k_tasks(test, "test")[:held_out], f"GSM8K, {source}")


def _gsm8k_tasks(text: str, split: str) -> list[Task]:
    rows = [json.loads(line) for line in text.splitlines()]
    return [
        Task(
            f"gsm8k-{split}-{number}",
            {"question": row["question"], "answer": row["answer"].rsplit("####", 1)[-1].strip()},
        )
        for number, row in enumerate(rows)
    ]


def split_by_story(tasks: Sequence[Task], held_out: int) -> tuple[list[Task], list[Task]]:
    """(train, held out): whole stories go to one side or the other, in seeded order."""
    stories = _stories(tasks)
    random.Random(SPLIT_SEED).shuffle(stories)
    test: list[Task] = []
    while stories and len(test) < held_out:
        test += stories.pop()
    rest = [task for story in stories for task in story]
    random.Random(SPLIT_SEED).shuffle(rest)
    return rest, test[:held_out]


def _stories(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks grouped so that any two of the same story are in one group."""
    words = [_words(task) for task in tasks]
    groups: list[list[int]] = []
    for i in range(len(tasks)):
        near = [g for g in groups if any(_similar(words[i], words[j]) for j in g)]
        merged = [j for g in near for j in g] + [i]
        groups = [g for g in groups if g not in near] + [merged]
    return [[tasks[i] for i in sorted(group)] for group in groups]


def _words(task: Task) -> frozenset[str]:
    text = re.sub(r"\d[\d,.]*", "#", question_of(task))
    return frozenset(re.sub(r"(?<=[^.?!] )[A-Z]\w+", "@", text).lower().replace(".", "").split())


def _similar(a: frozenset[str], b: frozenset[str]) -> bool:
    return len(a & b) >= SAME_STORY * len(a | b)


# --- the sample that ships -----------------------------------------------------------------------

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June")
_THINGS = ("pens", "books", "shells", "coins", "cards", "plums", "stamps", "beads", "cups", "kites")
_STORIES = (
    ("{name} had {a} {things}. {name} found {b} more {things}. How many {things} does {name} have now?", "+"),
    ("There are {a} red {things} and {b} blue {things} on a table. How many {things} are there?", "+"),
    ("{name} had {a} {things} and gave {b} away. How many {things} are left?", "-"),
    ("A shop sold {a} {things} on Monday and {b} on Friday. How many more did it sell on Monday?", "-"),
    ("Each bag holds {b} {things}. How many {things} are in {a} bags?", "*"),
    ("{name} walks past {a} houses with {b} {things} each. How many {things} does {name} pass?", "*"),
    ("{a} {things} are shared equally by {b} children. How many {things} does each child get?", "/"),
    ("{name} packs {a} {things} into boxes of {b}. How many boxes does {name} need?", "/"),
)


def _sample(held_out: int) -> Problems:
    """Generated problems; half of the stories are held out."""
    rng = random.Random(SPLIT_SEED)
    train = [_made(rng, rng.choice(_STORIES[::2]), f"sample-train-{i}") for i in range(400)]
    test = [_made(rng, rng.choice(_STORIES[1::2]), f"sample-test-{i}") for i in range(held_out)]
    return Problems(train, test, "generated sample")


def _made(rng: random.Random, story: tuple[str, str], task_id: str) -> Task:
    text, operation = story
    b = rng.randint(2, 12)
    a = b * rng.randint(2, 12) if operation == "/" else rng.randint(13, 60)
    question = text.format(name=rng.choice(_NAMES), things=rng.choice(_THINGS), a=a, b=b)
    return Task(task_id, {"question": question, "answer": shown(evaluate(f"{a} {operation} {b}"))})
