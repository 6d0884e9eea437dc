"""Train the searching agent on MuSiQue by reinforcement learning, and show what it learned.

    python -m examples.musique_rag.train [--seed 0] [--steps 8] [--encoder auto]

Builds the index of the passages once (`runs/musique-index-...`) and serves the retriever from this process.
Evaluates on held-out questions at the sampling temperature, trains by GRPO with one intermediate reward (a
search that works), evaluates again. The last line of output is JSON; its "before" and "after" are mean
held-out rewards, 0.9 · F1 + 0.1 · format.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from agentlightning.bridge import LearningSettings
from agentlightning.learning import AIR
from agentlightning.learning.air import tool_outcome
from agentlightning.types import Limits, ToolStatus
from agentlightning_server.cli.progress import ProgressReporter
from agentlightning_server.training import EmbeddedSettings, RunnerSettings, TrainSettings
from examples.engines import add_engine_options, train_with
from examples.musique_rag import ENV_RETRIEVER
from examples.musique_rag.data import Subset, load
from examples.musique_rag.encoders import load_encoder
from examples.musique_rag.index import FLAT, PassageIndex, build_index
from examples.musique_rag.passages import read_passages
from examples.musique_rag.retriever import Retriever, serving
from examples.reporting import report

SHARD = 500  # passages that are lost when a build is interrupted, at most
VALID_SEARCH = 0.1  # reward of the calls whose search ran; in all, however many there are


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8, help="policy updates")
    parser.add_argument("--tasks-per-step", type=int, default=6)
    parser.add_argument("--group-size", type=int, default=8, help="rollouts per question")
    parser.add_argument("--learning-rate", type=float, default=4e-5)
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains the full weights")
    parser.add_argument("--subset", default="steps", choices=get_args(Subset))
    parser.add_argument("--encoder", default="auto", help="auto, bge, minilm, words, or a model's name")
    parser.add_argument("--held-out", type=int, default=100, help="questions to evaluate on")
    parser.add_argument("--concurrency", type=int, default=64, help="questions worked on at the same time")
    parser.add_argument("--output", type=Path, help="folder of the run; an existing run is resumed")
    parser.add_argument("--fresh", action="store_true", help="start over where the folder holds a run")
    add_engine_options(parser)
    return parser.parse_args()


@contextmanager
def retriever_of(corpora: Sequence[Path], encoder_name: str) -> Generator[Retriever]:
    """Serve the retriever of these passages, indexed where they are not yet, while the block runs."""
    encoder = load_encoder(encoder_name)
    label = re.sub(r"\W+", "-", f"{encoder.name}-{corpora[0].stem}").strip("-")
    folder = Path("runs") / f"musique-index-{label}"
    build_index(lambda: read_passages(corpora), folder, encoder, factory=FLAT, shard_size=SHARD)
    retriever = Retriever(PassageIndex(folder), encoder)
    with serving(retriever) as url:
        os.environ[ENV_RETRIEVER] = url
        yield retriever


def main() -> None:
    args = options()
    began = time.monotonic()
    questions = load(args.subset, held_out=args.held_out)
    output: Path = args.output or Path("runs") / f"musique-{args.subset}-seed{args.seed}"
    if args.fresh:
        shutil.rmtree(output, ignore_errors=True)
    learning = LearningSettings(
        air=AIR(rules=[tool_outcome("valid_search", VALID_SEARCH, ToolStatus.OK)], bound=VALID_SEARCH)
    )
    training = TrainSettings(
        run_id=output.name,
        output=output,
        steps=args.steps,
        tasks_per_step=args.tasks_per_step,
        group_size=args.group_size,
        seed=args.seed,
        learning=learning,
        limits=Limits(start_to_close_s=300),
    )
    engine = EmbeddedSettings(
        learning_rate=args.learning_rate, lora_rank=args.lora_rank, seed=args.seed, context_length=2048
    )
    with retriever_of(questions.corpora, args.encoder) as retriever, ProgressReporter(args.steps) as reporter:
        result = train_with(
            args,
            RunnerSettings("examples.musique_rag.agent:solve", concurrency=args.concurrency),
            training,
            engine,
            train=questions.train,
            held_out=questions.held_out,
            reporter=reporter,
        )
    print(
        f"questions: {questions.source}; retriever: {retriever.encoder_name}; curve: {output / 'curve.png'}"
    )
    args.encoder = retriever.encoder_name
    report(
        result,
        output,
        args,
        example="musique_rag",
        title=f"MuSiQue ({args.subset}), SmolLM2-135M-Instruct, GRPO, seed {args.seed}",
        wall_s=time.monotonic() - began,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped; the same command without --fresh goes on from the last checkpoint"
        ) from None
