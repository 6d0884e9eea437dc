"""What each kind of index costs and finds, measured here and carried over to 21 million passages.

    python -m examples.musique_rag.measure_index INDEX [--output examples/musique_rag/results/index.json]

INDEX is a built Flat index, whose vectors are taken as they are; the questions of MuSiQue are the queries.
Measured: time to train and to add, bytes per passage (on disk, and mapped into memory when all of it is in
use), time of a query, and recall: the share of the 10 exact neighbours among the 10 found. Vectors made up of
the real ones (each moved a little) fill the larger sizes, for time and size only: recall is measured on the
real ones alone. What 21 million would cost is computed from bytes and seconds a passage, and named so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

from agentlightning_server.training.machine import machine
from examples.musique_rag.data import load
from examples.musique_rag.encoders import Encoder, load_encoder
from examples.musique_rag.index import IndexSettings
from examples.musique_rag.passages import read_passages

FACTORIES = ("Flat", "SQfp16", "SQ8", "HNSW32", "IVF96,Flat", "IVF96,SQ8", "IVF96,PQ48x8", "PQ48x8")
WIKIPEDIA = 21_015_324  # passages of the public dump
NEIGHBOURS = 10
PROBES = 16
MADE_UP = 0.05  # standard deviation, in a vector's length, of what moves a made-up vector


def vectors_of(folder: Path) -> NDArray[np.float32]:
    """All vectors of a Flat index."""
    parts: list[Any] = []
    for file in sorted(folder.glob("shard-*.faiss")):
        index: Any = faiss.read_index(str(file))
        parts.append(index.reconstruct_n(0, index.ntotal))
    return np.concatenate(parts)


def enlarged(vectors: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """So many vectors: the real ones first, then ones near them."""
    rng = np.random.default_rng(0)
    rows = vectors[rng.integers(0, len(vectors), count - len(vectors))]
    rows = rows + rng.normal(0, MADE_UP / rows.shape[1] ** 0.5, rows.shape).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.concatenate([vectors, rows])


def measured(
    factory: str, vectors: NDArray[np.float32], queries: NDArray[np.float32], exact: NDArray[np.int64] | None
) -> dict[str, Any]:
    """One index of these vectors."""
    index: Any = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    began = time.perf_counter()
    if not index.is_trained:
        index.train(vectors)
    trained = time.perf_counter()
    index.add(vectors)
    added = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index.faiss"
        faiss.write_index(index, str(file))
        size = file.stat().st_size
        served: Any = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        if hasattr(served, "nprobe"):
            served.nprobe = PROBES
        asked = time.perf_counter()
        _, found = served.search(queries, NEIGHBOURS)
        query_s = (time.perf_counter() - asked) / len(queries)
    seconds = (added - trained) / len(vectors)
    return {
        "factory": factory,
        "passages": len(vectors),
        "train_s": round(trained - began, 2),
        "add_us_per_passage": round(seconds * 1e6, 2),
        "bytes_per_passage": round(size / len(vectors), 1),
        "query_ms": round(query_s * 1e3, 3),
        **({"recall_at_10": round(_recall(found, exact), 4)} if exact is not None else {}),
        "computed_for_wikipedia": {
            "disk_gb": round(size / len(vectors) * WIKIPEDIA / 1e9, 1),
            "add_h": round(seconds * WIKIPEDIA / 3600, 2),
        },
    }


def _recall(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    return sum(shared) / exact.size


def encoding(encoder: Encoder, texts: Sequence[str]) -> dict[str, Any]:
    """The speed of the encoder on this machine."""
    began = time.perf_counter()
    encoder.passages(texts)
    rate = len(texts) / (time.perf_counter() - began)
    return {
        "encoder": encoder.name,
        "passages_per_s": round(rate, 1),
        "computed_for_wikipedia_days": round(WIKIPEDIA / rate / 86400, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--encoder", default="auto")
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000], help="besides the real passages")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "index.json")
    args = parser.parse_args()
    settings = IndexSettings(**json.loads((args.index / "meta.json").read_text()))
    encoder = load_encoder(args.encoder)
    assert encoder.name == settings.encoder, f"the index was built with {settings.encoder}"
    vectors = vectors_of(args.index)
    questions = load("musique", held_out=100)
    asked = [str(task.input["question"]) for task in questions.held_out if isinstance(task.input, dict)]
    queries = encoder.queries(asked)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :NEIGHBOURS]
    texts = [passage.text for passage, _ in zip(read_passages(questions.corpora), range(128), strict=False)]
    lines = [measured(factory, vectors, queries, exact) for factory in FACTORIES]
    for size in args.sizes:
        larger = enlarged(vectors, size)
        lines += [measured(factory, larger, queries, None) for factory in FACTORIES]
    result = {
        **machine(),
        "dimension": vectors.shape[1],
        "probes": PROBES,
        "encoding": encoding(encoder, texts),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**result, "indexes": lines}, indent=1) + "\n")
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
