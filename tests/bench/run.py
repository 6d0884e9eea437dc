"""All measurements, one after the other, written to results/bench.json.

    make bench

Absolute numbers are those of one machine on one day; ratios travel.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("bench_adapters", "bench_store", "bench_gateway", "bench_engine")


def main() -> None:
    """Run every part and write the file."""
    results: dict[str, object] = {"machine": machine()}
    for name in PARTS:
        print(f"{name} ...", flush=True)
        part = importlib.import_module(f"tests.bench.{name}")
        results[name] = {
            key: round(value, 4) if isinstance(value, float) else value for key, value in part.run().items()
        }
        print(json.dumps(results[name], indent=1), flush=True)
    path = ROOT / "results" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")


def machine() -> dict[str, object]:
    """Where and of what these numbers are."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
