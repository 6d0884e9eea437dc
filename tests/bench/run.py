"""All measurements, one after the other, written to results/bench.json.

    make bench

Absolute numbers are those of one machine on one day; ratios travel.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from agentlightning_server.training.machine import machine

ROOT = Path(__file__).parents[2]
PARTS = ("bench_adapters", "bench_store", "bench_gateway", "bench_merging", "bench_engine")


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


if __name__ == "__main__":
    main()
