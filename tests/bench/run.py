"""All measurements, one after the other, written to results/bench.json.

    make bench                                     all of them
    python -m tests.bench.run bench_adapters ...   some, the others stay as they stand in the file

Absolute numbers are those of one machine on one day; ratios travel.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from agentlightning_server.training.machine import machine

ROOT = Path(__file__).parents[2]
PARTS = (
    "bench_adapters",
    "bench_instrumentations",
    "bench_store",
    "bench_server",
    "bench_database",
    "bench_gateway",
    "bench_merging",
    "bench_engine",
)


def main() -> None:
    """Run every part and write the file."""
    path = ROOT / "results" / "bench.json"
    chosen = sys.argv[1:] or PARTS
    results: dict[str, object] = {}
    if sys.argv[1:] and path.exists():
        results = json.loads(path.read_text())
    for name in chosen:
        print(f"{name} ...", flush=True)
        part = importlib.import_module(f"tests.bench.{name}")
        results[name] = {"machine": machine()} | {
            key: round(value, 4) if isinstance(value, float) else value for key, value in part.run().items()
        }
        print(json.dumps(results[name], indent=1), flush=True)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
