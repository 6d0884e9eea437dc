"""Train the note-following agent under one way of assigning credit, and say what it came to.

    python -m examples.credit_ablation.train --credit air --seed 0 [--steps 6]

Everything but the credit is the same in all runs of one seed: tasks, order, rollouts, optimiser. The last
line of output is JSON; `records.json` in the output folder has every step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from agentlightning.bridge import LearningSettings, deciding_attempt
from agentlightning.learning import AIR, StepGroups, air_weighted, default_rules, identical
from agentlightning.learning.air import repeated_call, tool_outcome
from agentlightning.reading import read_episode
from agentlightning.types import Episode, Mode, ToolStatus
from agentlightning_server.cli.progress import ProgressReporter
from agentlightning_server.store import RolloutFilter, Store
from agentlightning_server.training import (
    EmbeddedSettings,
    RunnerSettings,
    TrainSettings,
    train_locally,
)
from agentlightning_server.training.machine import machine
from examples.credit_ablation.agent import make_tasks

ARMS: Mapping[str, LearningSettings] = {
    "identical": LearningSettings(credit=identical),  # the final reward for every call
    "step_groups": LearningSettings(credit=identical, steps=StepGroups()),  # GiGPO
    # A call whose tool ran is paid, the same call again is not.
    "air": LearningSettings(
        credit=air_weighted(),
        air=AIR(rules=[tool_outcome("tool_succeeded", 0.1, ToolStatus.OK), repeated_call(-0.2)]),
    ),
    # Calls whose tool failed are fined as well.
    "air_fines": LearningSettings(credit=air_weighted(), air=AIR(default_rules(fine=0.1))),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--credit", choices=list(ARMS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6, help="policy updates")
    parser.add_argument("--tasks-per-step", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8, help="rollouts per task")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--held-out", type=int, default=64, help="tasks to evaluate on")
    parser.add_argument("--output", type=Path, help="folder of the run")
    return parser.parse_args()


def main() -> None:
    args = options()
    began = time.monotonic()
    output: Path = args.output or Path("runs/credit_ablation") / f"{args.credit}-seed{args.seed}"
    training = TrainSettings(
        run_id=output.name,
        output=output,
        steps=args.steps,
        tasks_per_step=args.tasks_per_step,
        group_size=args.group_size,
        checkpoint_every=args.steps,
        seed=args.seed,
        max_flat_steps=args.steps + 1,  # to learn nothing is a result here
        learning=ARMS[args.credit],
    )
    with ProgressReporter(args.steps) as reporter:
        result = train_locally(
            RunnerSettings("examples.credit_ablation.agent:solve", concurrency=64, tracer="light"),
            training,
            EmbeddedSettings(learning_rate=args.learning_rate, seed=args.seed, context_length=1024),
            train=make_tasks(args.steps * args.tasks_per_step, seed=args.seed, split="train"),
            held_out=make_tasks(args.held_out, seed=0, split="val"),
            reporter=reporter,
        )
    before, after = result.before, result.after
    done = habits(output / "store.db", args.steps)
    records = {
        "credit": args.credit,
        "seed": args.seed,
        "settings": {name: str(value) for name, value in vars(args).items() if name != "output"},
        **machine(),
        "wall_s": round(time.monotonic() - began, 1),
        "steps": [asdict(record) for record in result.steps],
        "evaluations": [asdict(record) for record in (before, after) if record is not None],
        "habits": done,
    }
    (output / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)  # 1.6 GB that nobody will ask for again
    line = {"credit": args.credit, "seed": args.seed, "before": before and before.reward}
    print(json.dumps({**line, "after": after and after.reward, **done}), flush=True)


def habits(database: Path, step: int) -> dict[str, float]:
    """What the trained agent does in the held-out tasks: mean number of calls per episode, by kind."""
    counts: Counter[str] = Counter()
    episodes = 0
    with Store(database) as store:
        for rollout in store.rollouts(RolloutFilter(mode=Mode.VAL, limit=10_000)):
            attempt = deciding_attempt(store.attempts(rollout.id))
            if rollout.group_id.rsplit(".", 2)[-2] == str(step) and attempt is not None:
                counts += kinds(read_episode(rollout, attempt, store.spans(rollout.id)))
                episodes += 1
    return {kind: round(counts[kind] / max(episodes, 1), 3) for kind in ("new_note", "same_note", "failed")}


def kinds(episode: Episode) -> Counter[str]:
    """Tool calls that read a note for the first time, read one again, or failed."""
    read: set[str] = set()
    found: Counter[str] = Counter()
    for tool in episode.tool_calls:
        arguments = json.dumps(tool.arguments, sort_keys=True, default=str)
        if tool.status is not ToolStatus.OK:
            found["failed"] += 1
        else:
            found["same_note" if arguments in read else "new_note"] += 1
            read.add(arguments)
    return found


if __name__ == "__main__":
    main()
