"""Numbers beside the training run: the retriever, trivial baselines, and the agent.

    python -m examples.musique_rag.evaluate                                   # retriever and baselines only
    python -m examples.musique_rag.evaluate --agent [--checkpoint runs/musique-steps-seed0]

The retriever is asked the question as it stands. `found` is the share of questions with a gold answer in the
text of the first passages: what an agent that only reads can reach at most.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from agentlightning import Task
from agentlightning_server.training import EmbeddedSettings
from examples.musique_rag.data import Subset, load
from examples.musique_rag.index import Hit
from examples.musique_rag.retriever import Retriever
from examples.musique_rag.reward import reward
from examples.musique_rag.train import retriever_of
from examples.reporting import agent_score

COUNTS = (1, 2, 5, 10)


def _name(text: str) -> str:
    """The first name or number of a text that is not its first word."""
    found = re.search(r"(?<=\w )(?:[A-Z]\w+(?: [A-Z]\w+)*|\d+)", text)
    return found.group() if found else "nothing"


BASELINES: Mapping[str, Callable[[str, Hit], str]] = {
    "title of the first passage": lambda _, hit: hit.passage.title,
    "first name or number in the first passage": lambda _, hit: _name(hit.passage.text),
    "first name or number in the question": lambda question, _: _name(question),
}


def measures(tasks: Sequence[Task], retriever: Retriever) -> dict[str, Any]:
    """What the retriever finds, and the mean reward of each baseline."""
    found = dict.fromkeys(COUNTS, 0)
    earned = dict.fromkeys(BASELINES, 0.0)
    for task in tasks:
        assert isinstance(task.input, Mapping)
        question, golds = str(task.input["question"]), _golds(task)
        hits = retriever.search(question, max(COUNTS))
        for count in COUNTS:
            texts = [hit.passage.text.lower() for hit in hits[:count]]
            found[count] += any(gold.lower() in text for gold in golds for text in texts)
        for name, answer in BASELINES.items():
            earned[name] += reward(f"<answer>{answer(question, hits[0])}</answer>", golds)
    return {
        "found": {f"@{count}": round(hits / len(tasks), 4) for count, hits in found.items()},
        "baselines": {name: round(total / len(tasks), 4) for name, total in earned.items()},
    }


def _golds(task: Task) -> list[str]:
    assert isinstance(task.input, Mapping)
    golds = task.input["golds"]
    assert isinstance(golds, Sequence)
    return [str(gold) for gold in golds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subset", default="steps", choices=get_args(Subset))
    parser.add_argument("--encoder", default="auto", help="auto, bge, minilm, words, or a model's name")
    parser.add_argument("--agent", action="store_true", help="run the agent too")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of a training run; none: the base model")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/musique-evaluate"))
    args = parser.parse_args()
    questions = load(args.subset, held_out=args.held_out)
    line: dict[str, Any] = {"questions": questions.source, "held_out": len(questions.held_out)}
    with retriever_of(questions.corpora, args.encoder) as retriever:
        line["encoder"] = retriever.encoder_name
        line |= measures(questions.held_out, retriever)
        if args.agent:
            line["agent"] = agent_score(
                "examples.musique_rag.agent:solve",
                questions.held_out,
                EmbeddedSettings(context_length=2048),
                args.output / time.strftime("%Y%m%d-%H%M%S"),
                args.checkpoint,
            )
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
