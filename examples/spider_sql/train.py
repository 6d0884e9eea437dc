"""Train the SQL agents on Spider by reinforcement learning, and show what they learned.

    python -m examples.spider_sql.train [--seed 0] [--steps 8] [--agents writer rewriter]

SmolLM2-135M writes no right query on its own, so there is nothing to reinforce: the run begins with a
supervised warm start on gold queries of the training databases, made once and shared by all seeds
(--lessons 0 leaves it out). Then held-out questions are evaluated, the policy is trained by GRPO, and they
are evaluated again. Only the calls of `--agents` are trained; the checker's are context. The last line of
output is JSON.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import get_args

from agentlightning.bridge import LearningSettings
from agentlightning.learning.selection import select_agents
from agentlightning.types import Limits
from agentlightning_server.cli.progress import ProgressReporter
from agentlightning_server.training import EmbeddedSettings, RunnerSettings, TrainSettings
from examples.engines import add_engine_options, train_with
from examples.reporting import report
from examples.spider_sql.data import Subset, load
from examples.spider_sql.lessons import lessons
from examples.warm_start import warm_start

AGENTS = ("writer", "checker", "rewriter")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8, help="policy updates")
    parser.add_argument("--tasks-per-step", type=int, default=6)
    parser.add_argument("--group-size", type=int, default=8, help="rollouts per question")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains the full weights")
    parser.add_argument(
        "--agents", nargs="+", default=["writer", "rewriter"], choices=AGENTS, help="to train"
    )
    parser.add_argument("--lessons", type=int, default=200, help="questions of the warm start; 0 for none")
    parser.add_argument("--lessons-rate", type=float, default=1e-4, help="learning rate of the warm start")
    parser.add_argument("--subset", default="simple", choices=get_args(Subset))
    parser.add_argument("--held-out", type=int, default=120, help="questions to evaluate on")
    parser.add_argument("--concurrency", type=int, default=64, help="questions worked on at the same time")
    parser.add_argument("--output", type=Path, help="folder of the run; an existing run is resumed")
    parser.add_argument("--fresh", action="store_true", help="start over where the folder holds a run")
    add_engine_options(parser)
    return parser.parse_args()


def main() -> None:
    args = options()
    began = time.monotonic()
    questions = load(args.subset, held_out=args.held_out)
    output: Path = (
        args.output or Path("runs") / f"spider-{args.subset}-{'+'.join(args.agents)}-seed{args.seed}"
    )
    if args.fresh:
        shutil.rmtree(output, ignore_errors=True)
    engine = EmbeddedSettings(
        learning_rate=args.learning_rate, lora_rank=args.lora_rank, seed=args.seed, context_length=1024
    )
    training = TrainSettings(
        run_id=output.name,
        output=output,
        steps=args.steps,
        tasks_per_step=args.tasks_per_step,
        group_size=args.group_size,
        seed=args.seed,
        learning=LearningSettings(select=select_agents(*args.agents)),
        limits=Limits(start_to_close_s=300),
    )
    checkpoint = None
    if args.lessons and args.engine == "embedded":
        taught = EmbeddedSettings(
            learning_rate=args.lessons_rate, lora_rank=args.lora_rank, context_length=1024
        )
        folder = Path("runs") / f"spider-warm-{args.subset}-{args.lessons}-lora{args.lora_rank}"
        checkpoint = warm_start(lambda: lessons(questions.train[: args.lessons]), folder, taught, epochs=1)
    with ProgressReporter(args.steps) as reporter:
        result = train_with(
            args,
            RunnerSettings("examples.spider_sql.agent:solve", concurrency=args.concurrency),
            training,
            engine,
            train=questions.train,
            held_out=questions.held_out,
            reporter=reporter,
            checkpoint=checkpoint,
        )
    print(f"questions: {questions.source}; checkpoint: {result.checkpoint}; curve: {output / 'curve.png'}")
    report(
        result,
        output,
        args,
        example="spider_sql",
        title=f"Spider ({args.subset}), SmolLM2-135M-Instruct, GRPO, seed {args.seed}",
        wall_s=time.monotonic() - began,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped; the same command without --fresh goes on from the last checkpoint"
        ) from None
