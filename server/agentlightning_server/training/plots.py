"""The reward curve of a run as a PNG, drawn from its records."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agentlightning_server.training.reporting import EvalRecord, StepRecord

Z95 = 1.96


def draw_curve(
    path: Path, steps: Sequence[StepRecord], evaluations: Sequence[EvalRecord], *, title: str
) -> None:
    """Write `path`: training reward and tool-call share per step, held-out reward with 95 % intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    x = [record.step for record in steps]  # a step's rollouts are sampled before its update
    axes.plot(x, [r.tool_calls for r in steps], color="#d17a22", label="correct tool call (training)")
    axes.plot(x, [r.reward for r in steps], color="#2b6cb0", label="reward (training)")
    held_out = [record.reward for record in evaluations]
    axes.errorbar(
        [record.step for record in evaluations],
        held_out,
        yerr=[Z95 * record.stderr for record in evaluations],
        fmt="o",
        color="#1a365d",
        capsize=4,
        label="reward (held out, 95 % interval)",
    )
    axes.plot(
        [record.step for record in evaluations],
        [record.tool_calls for record in evaluations],
        "s",
        color="#8a4b0f",
        label="correct tool call (held out)",
    )
    axes.set(xlabel="policy updates", ylabel="share of episodes", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
