"""Questions of MuSiQue: from `../shared/data/musique`, else the public hub, else a small sample.

MuSiQue (Trivedi et al., 2022) is licensed CC BY 4.0, 2WikiMultiHopQA's passages CC BY-SA; neither is part of
this repository. Questions that rest on the same page of Wikipedia stand on one side of the split only, as do
the steps of one question.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentlightning import Task
from examples.musique_rag import hub
from examples.musique_rag.passages import Passage, read_passages

Subset = Literal["steps", "musique", "sample"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "musique"
CORPORA = ("corpus_musique.json", "corpus_2wiki.json")
QUESTIONS = ("dev_with_paragraphs.jsonl", "dev_questions.json")
SAMPLE = Path(__file__).parent / "sample.json"
SPLIT_SEED = 1234
RELATION = ">>"  # a step as a relation of a knowledge base, not as a question


@dataclass(frozen=True, slots=True)
class Questions:
    """Training and held-out questions, the files with the passages that answer them, and their source."""

    train: Sequence[Task]
    held_out: Sequence[Task]
    corpora: Sequence[Path]
    source: str


@dataclass(frozen=True, slots=True)
class _Item:
    """A question with the titles of the pages it rests on, which are in the corpus."""

    id: str
    question: str
    golds: Sequence[str]
    pages: frozenset[str]


def load(subset: Subset = "steps", *, held_out: int = 100) -> Questions:
    """Questions of a subset. Each task's input is {"question", "golds"}.

    "steps": single steps of MuSiQue's questions, those that are worded as questions, with the answers of
    earlier steps filled in; "musique": the whole questions; "sample": a few that ship, no download. Only
    questions whose pages are in the corpus with their answers. Without a network the sample is used, and
    `source` says so.
    """
    if subset == "sample":
        return _sample(held_out)
    try:
        folder, source = _folder()
        corpora = [folder / name for name in CORPORA]
        rows = [row for name in QUESTIONS for row in _rows(folder / name)]
        items = list(_items(rows, _pages(corpora), subset))
    except OSError as error:
        questions = _sample(held_out)
        return Questions(
            questions.train,
            questions.held_out,
            questions.corpora,
            f"{questions.source} ({subset} unavailable: {error})",
        )
    train, test = _split(items, held_out)
    return Questions(train, test, corpora, f"MuSiQue ({subset}), {source}")


def _folder() -> tuple[Path, str]:
    if all((SHARED / name).exists() for name in (*CORPORA, *QUESTIONS)):
        return SHARED, "shared data"
    return hub.folder(), hub.SOURCE


def _rows(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


def _pages(corpora: Iterable[Path]) -> Mapping[str, list[Passage]]:
    pages: dict[str, list[Passage]] = defaultdict(list)
    for passage in read_passages(corpora):
        pages[passage.title].append(passage)
    return pages


def _items(
    rows: Iterable[Mapping[str, Any]], pages: Mapping[str, list[Passage]], subset: Subset
) -> Iterable[_Item]:
    asked: set[str] = set()
    for row in rows:
        steps = list(_steps(row))
        if subset == "musique":
            if all(_answered(step, pages) for step in steps):
                golds = (row["answer"], *row["answer_aliases"])
                yield _Item(
                    row["id"],
                    row["question"],
                    golds,
                    frozenset(page for step in steps for page in step.pages),
                )
            continue
        for step in steps:
            if RELATION not in step.question and step.question not in asked and _answered(step, pages):
                asked.add(step.question)
                yield step


def _steps(row: Mapping[str, Any]) -> Iterable[_Item]:
    """The steps of a question, with the answers of earlier ones in the place of #1, #2, ..."""
    titles = {paragraph["idx"]: paragraph["title"] for paragraph in row.get("paragraphs", ())}
    answers: list[str] = []
    for number, step in enumerate(row["question_decomposition"]):
        question = re.sub(r"#(\d)", lambda m: answers[int(m[1]) - 1], step["question"])
        answers.append(step["answer"])
        title = titles.get(step["paragraph_support_idx"]) or re.sub(r"_\d+$", "", step["document_id"])
        question = re.sub(r"\s+\?", "?", question)
        yield _Item(f"{row['id']}-{number}", question, (step["answer"],), frozenset({title}))


def _answered(step: _Item, pages: Mapping[str, list[Passage]]) -> bool:
    answer = step.golds[0].lower()
    return any(answer in passage.text.lower() for title in step.pages for passage in pages.get(title, ()))


def _split(items: Sequence[_Item], held_out: int) -> tuple[list[Task], list[Task]]:
    """(train, held out): items that share a page stay together, in seeded order."""
    groups: list[tuple[set[str], list[_Item]]] = []
    for item in items:
        near = [group for group in groups if group[0] & item.pages]
        merged = (set(item.pages).union(*(g[0] for g in near)), [item, *(i for g in near for i in g[1])])
        groups = [group for group in groups if group not in near] + [merged]
    random.Random(SPLIT_SEED).shuffle(groups)
    test: list[_Item] = []
    while groups and len(test) < held_out:
        test += groups.pop()[1]
    train = [item for _, group in groups for item in group]
    random.Random(SPLIT_SEED).shuffle(train)
    return [_task(item) for item in train], [_task(item) for item in test[:held_out]]


def _task(item: _Item) -> Task:
    return Task(item.id, {"question": item.question, "golds": list(item.golds)})


def _sample(held_out: int) -> Questions:
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    tasks = [
        Task(f"sample-{i}", {"question": row["question"], "golds": row["golds"]})
        for i, row in enumerate(rows)
    ]
    half = len(tasks) // 2
    return Questions(
        tasks[:half],
        tasks[half:][:held_out],
        [SAMPLE],
        "the sample that ships, about places that do not exist",
    )
