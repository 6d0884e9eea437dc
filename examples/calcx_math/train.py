"""Train the calculator agent on word problems by reinforcement learning alone, and show what it learned.

    python -m examples.calcx_math.train [--seed 0] [--steps 8] [--subset easy]

Evaluates on held-out problems at the sampling temperature, trains by GRPO with one intermediate reward (a
tool call that works), evaluates again. Writes the reward curve, the records and the checkpoint to the output
folder; the last line of output is JSON. Its "before" and "after" are mean held-out rewards: 1 for a right
answer that a tool returned, without the intermediate reward.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import get_args

from agentlightning.bridge import LearningSettings
from agentlightning.learning import AIR
from agentlightning.learning.air import tool_outcome
from agentlightning.types import Limits, ToolStatus
from agentlightning_server.cli.progress import ProgressReporter
from agentlightning_server.training import EmbeddedSettings, RunnerSettings, TrainSettings
from examples.calcx_math.data import Subset, load
from examples.engines import add_engine_options, train_with
from examples.reporting import report

VALID_CALL = 0.1  # reward of the calls whose tool ran; in all, however many there are


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8, help="policy updates")
    parser.add_argument("--tasks-per-step", type=int, default=6)
    parser.add_argument("--group-size", type=int, default=8, help="rollouts per problem")
    parser.add_argument("--learning-rate", type=float, default=4e-5)
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains the full weights")
    parser.add_argument("--subset", default="easy", choices=get_args(Subset))
    parser.add_argument("--held-out", type=int, default=120, help="problems to evaluate on, at least 100")
    parser.add_argument("--concurrency", type=int, default=64, help="problems worked on at the same time")
    parser.add_argument("--output", type=Path, help="folder of the run; an existing run is resumed")
    parser.add_argument("--fresh", action="store_true", help="start over where the folder holds a run")
    add_engine_options(parser)
    return parser.parse_args()


def main() -> None:
    args = options()
    began = time.monotonic()
    problems = load(args.subset, held_out=args.held_out)
    output: Path = args.output or Path("runs") / f"calcx-{args.subset}-seed{args.seed}"
    if args.fresh:
        shutil.rmtree(output, ignore_errors=True)
    learning = LearningSettings(
        air=AIR(rules=[tool_outcome("valid_call", VALID_CALL, ToolStatus.OK)], bound=VALID_CALL)
    )
    training = TrainSettings(
        run_id=output.name,
        output=output,
        steps=args.steps,
        tasks_per_step=args.tasks_per_step,
        group_size=args.group_size,
        seed=args.seed,
        learning=learning,
        limits=Limits(start_to_close_s=120),
    )
    engine = EmbeddedSettings(
        learning_rate=args.learning_rate, lora_rank=args.lora_rank, seed=args.seed, context_length=1024
    )
    with ProgressReporter(args.steps) as reporter:
        result = train_with(
            args,
            RunnerSettings("examples.calcx_math.agent:solve", concurrency=args.concurrency),
            training,
            engine,
            train=problems.train,
            held_out=problems.held_out,
            reporter=reporter,
        )
    print(f"problems: {problems.source}; checkpoint: {result.checkpoint}; curve: {output / 'curve.png'}")
    report(
        result,
        output,
        args,
        example="calcx_math",
        title=f"Calc-X ({args.subset}), SmolLM2-135M-Instruct, GRPO, seed {args.seed}",
        wall_s=time.monotonic() - began,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped; the same command without --fresh goes on from the last checkpoint"
        ) from None
