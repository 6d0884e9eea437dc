"""Numbers beside the training run: trivial baselines, and the agent on the full sets.

    python -m examples.calcx_math.evaluate                                       # baselines only
    python -m examples.calcx_math.evaluate --agent [--checkpoint runs/.../step-000008]

A baseline sees the problem's numbers in order of mention and always does the same with the first two; it is
scored as strictly as the agent, as if it had called the tool with them.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentlightning import Task
from agentlightning_server.training import EmbeddedSettings
from examples.calcx_math.calculator import evaluate
from examples.calcx_math.data import Subset, load, question_of
from examples.calcx_math.reward import number_in, same_number
from examples.reporting import agent_score

SUBSETS: tuple[Subset, ...] = ("easy", "one-step", "svamp", "gsm8k")
BASELINES = ("{a} + {b}", "{a} - {b}", "{b} - {a}", "{a} * {b}", "{a} / {b}")


def baseline(tasks: Sequence[Task], pattern: str) -> float:
    """Mean strict reward of always calling the tool with `pattern` of the first two numbers."""
    return sum(_solves(task, pattern) for task in tasks) / len(tasks)


def _solves(task: Task, pattern: str) -> bool:
    assert isinstance(task.input, Mapping)
    numbers = re.findall(r"\d+(?:\.\d+)?", question_of(task).replace(",", ""))
    wanted = number_in(str(task.input["answer"]))
    if len(numbers) < 2 or wanted is None:
        return False
    try:
        return same_number(evaluate(pattern.format(a=numbers[0], b=numbers[1])), wanted)
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "subsets", nargs="*", default=SUBSETS, help=f"of {', '.join(SUBSETS)}; all by default"
    )
    parser.add_argument("--agent", action="store_true", help="run the agent too")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of a training run; none: the base model")
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("runs/calcx-evaluate"))
    args = parser.parse_args()
    for subset in args.subsets:
        tasks = load(subset, held_out=args.held_out).held_out
        line: dict[str, Any] = {"subset": subset, "held_out": len(tasks)}
        line["baselines"] = {pattern: round(baseline(tasks, pattern), 4) for pattern in BASELINES}
        if args.agent:
            line["agent"] = agent_score(
                "examples.calcx_math.agent:solve",
                tasks,
                EmbeddedSettings(context_length=1024),
                args.output / f"{subset}-{time.strftime('%Y%m%d-%H%M%S')}",
                args.checkpoint,
            )
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
