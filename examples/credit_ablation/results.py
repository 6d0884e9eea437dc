"""Records of the runs -> the table and the plot in `results/`.

    python -m examples.credit_ablation.results runs/credit_ablation

Intervals are 95 %, by Student's t over seeds; differences are paired by seed, whose tasks and order the runs
share.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.credit_ablation.train import ARMS

RESULTS = Path(__file__).parent / "results"
BASELINE = "identical"
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided quantiles of Student's t by degrees of freedom (any table of it)."""
LABELS = {
    "identical": "identical",
    "step_groups": "identical, step groups (GiGPO)",
    "air": "AIR: working calls paid",
    "air_fines": "AIR: failed calls fined as well",
}
COLOURS = {"identical": "#4a5568", "step_groups": "#805ad5", "air": "#2b6cb0", "air_fines": "#c05621"}
HEAD = (
    "| credit | held-out reward after, by seed | mean (95 %) | against identical (95 %) "
    "| new notes read | same note again | failed calls |\n|---|---|---|---|---|---|---|"
)

Records = Mapping[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval); the half width of a single value is infinite."""
    if len(values) < 2:
        return mean(values), math.inf
    return mean(values), T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], sign: str = "") -> str:
    """The mean with its interval, as a cell of the table."""
    middle, half = interval(values)
    return f"{middle:{sign}.3f} ± {half:.3f}"


def load(folder: Path) -> dict[str, dict[int, Records]]:
    """The records by credit and seed, for the credits in `ARMS`."""
    found: dict[str, dict[int, Records]] = {name: {} for name in ARMS}
    for path in sorted(folder.glob("*/records.json")):
        records: Records = json.loads(path.read_text())
        found[records["credit"]][records["seed"]] = records
    return found


def after(records: Records) -> float:
    """The held-out reward of the trained policy."""
    return records["evaluations"][-1]["reward"]


def row(name: str, runs: Mapping[int, Records], baseline: Mapping[int, Records]) -> str:
    """One line of the table."""
    finals = [after(runs[seed]) for seed in sorted(runs)]
    against = [after(runs[seed]) - after(baseline[seed]) for seed in sorted(runs) if seed in baseline]
    habits = [
        f"{mean(records['habits'][kind] for records in runs.values()):.2f}"
        for kind in ("new_note", "same_note", "failed")
    ]
    difference = "" if name == BASELINE else shown(against, "+")
    by_seed = " ".join(f"{value:.2f}" for value in finals)
    return f"| {LABELS[name]} | {by_seed} | {shown(finals)} | {difference} | {' | '.join(habits)} |"


def draw(runs: Mapping[str, Mapping[int, Records]], path: Path) -> None:
    """Training reward by update and held-out reward at the end: means over seeds with their intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 2))
    for position, (name, of_seed) in enumerate(runs.items()):
        by_step = zip(*([step["reward"] for step in r["steps"]] for r in of_seed.values()), strict=True)
        middles, halves = zip(*(interval(rewards) for rewards in by_step), strict=True)
        x = range(1, len(middles) + 1)
        curves.plot(x, middles, color=COLOURS[name], label=LABELS[name])
        low, high = ([m + sign * h for m, h in zip(middles, halves, strict=True)] for sign in (-1, 1))
        curves.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        finals = [after(records) for records in of_seed.values()]
        middle, half = interval(finals)
        bars.errorbar([position], [middle], yerr=[half], fmt="s", color=COLOURS[name], capsize=5)
        bars.plot([position + 0.15] * len(finals), finals, "o", color=COLOURS[name], alpha=0.5, markersize=4)
    curves.set(xlabel="step", ylabel="reward of its rollouts", ylim=(0, 1), title="training")
    curves.legend(loc="upper left", fontsize=8)
    bars.set(ylim=(0, 1), title="held out, after training", xlim=(-0.5, len(runs) - 0.5))
    bars.set_xticks(range(len(runs)), [name.replace("_", "\n") for name in runs])
    for axes in (curves, bars):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    """Write table and plot, and the records beside them without the rewards of single tasks."""
    runs = {name: of_seed for name, of_seed in load(Path(sys.argv[1])).items() if of_seed}
    RESULTS.mkdir(exist_ok=True)
    lines = [HEAD, *(row(name, of_seed, runs[BASELINE]) for name, of_seed in runs.items())]
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n")
    draw(runs, RESULTS / "curves.png")
    kept = [short(records) for of_seed in runs.values() for records in of_seed.values()]
    (RESULTS / "records.json").write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join(lines))


def short(records: Records) -> Records:
    """The records without the rewards of single tasks."""
    evaluations = [
        {key: value for key, value in evaluation.items() if key not in ("rewards", "returns")}
        for evaluation in records["evaluations"]
    ]
    return {**records, "evaluations": evaluations}


if __name__ == "__main__":
    main()
