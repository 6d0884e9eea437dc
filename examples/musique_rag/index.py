"""A sharded index of passages: built in parts that survive an interruption, served from disk.

    folder/ meta.json            encoder, dimension, factory, shard size, seed
            trained.faiss        the empty index, with what it learned from a sample of the passages
            shard-00000.faiss    vectors of one shard, .jsonl its texts, .npy where each text begins

`factory` is a description for FAISS's index factory: "Flat" is exact, "SQ8" takes a quarter of the memory,
"IVF16384,PQ48x8" suits 21 million passages. Similarity is the cosine.
Invariants: a shard's vectors are written last and whole, so a shard that has them is done; passages are read
as a stream, one shard at a time; serving maps the files into memory instead of reading them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentlightning.errors import AgentLightningError, InvalidInput
from examples.musique_rag.encoders import Encoder
from examples.musique_rag.passages import Passage

FLAT = "Flat"
BATCH = 512  # passages that are encoded at once


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """What an index is made of. A build goes on with the same ones only."""

    encoder: str
    dimension: int
    factory: str = FLAT
    shard_size: int = 100_000
    training_passages: int = 100_000
    """Sampled to train what the factory names; Flat needs none."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found, and its cosine to the query."""

    passage: Passage
    score: float
    number: int
    """Place of the passage among all that were indexed."""


# --- building ------------------------------------------------------------------------------------


def build_index(
    passages: Callable[[], Iterable[Passage]],
    folder: Path,
    encoder: Encoder,
    *,
    factory: str = FLAT,
    shard_size: int = 100_000,
    training_passages: int = 100_000,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Index all passages, going on where an earlier build stopped. Returns how many there are.

    `passages` is called once to index and, where the factory needs training, once more to draw the sample.
    """
    settings = IndexSettings(encoder.name, encoder.dimension, factory, shard_size, training_passages)
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / "meta.json", settings)
    trained = folder / "trained.faiss"
    if not trained.exists():
        _write_index(_trained(passages, encoder, settings), trained)
    count = 0
    stream = iter(passages())
    for number, shard in enumerate(iter(lambda: list(islice(stream, shard_size)), [])):
        name = folder / f"shard-{number:05d}"
        if not name.with_suffix(".faiss").exists():
            _write_shard(name, shard, encoder, trained)
        count += len(shard)
        progress(count)
    return count


def _check_settings(file: Path, settings: IndexSettings) -> None:
    if not file.exists():
        _write_whole(file, lambda path: path.write_text(json.dumps(asdict(settings), indent=1)))
    elif (found := json.loads(file.read_text())) != asdict(settings):
        different = sorted(name for name, value in asdict(settings).items() if found.get(name) != value)
        raise InvalidInput(
            f"the index in {file.parent} was begun with other settings ({', '.join(different)}): "
            "use the same ones, or another folder"
        )


def _trained(passages: Callable[[], Iterable[Passage]], encoder: Encoder, settings: IndexSettings) -> Any:
    faiss = _faiss()
    try:
        index = faiss.index_factory(settings.dimension, settings.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InvalidInput(f"FAISS knows no index {settings.factory!r}: {error}") from error
    if not index.is_trained:
        sample = _sample(passages(), settings.training_passages, settings.seed)
        vectors = np.concatenate(list(_vectors(sample, encoder)))
        try:
            index.train(vectors)
        except RuntimeError as error:
            raise InvalidInput(
                f"{settings.factory} cannot be trained on {len(vectors)} passages: take one with fewer "
                f"lists or codes, or more training passages ({error})"
            ) from error
    return index


def _sample(passages: Iterable[Passage], count: int, seed: int) -> list[Passage]:
    """So many passages, each as likely as any other (reservoir sampling)."""
    rng = random.Random(seed)
    sample: list[Passage] = []
    for seen, passage in enumerate(passages):
        if len(sample) < count:
            sample.append(passage)
        elif (place := rng.randrange(seen + 1)) < count:
            sample[place] = passage
    return sample


def _write_shard(name: Path, shard: Sequence[Passage], encoder: Encoder, trained: Path) -> None:
    lines = [json.dumps(asdict(passage)).encode() + b"\n" for passage in shard]
    starts = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    _write_whole(name.with_suffix(".jsonl"), lambda path: path.write_bytes(b"".join(lines)))
    np.save(name.with_suffix(".npy"), starts)
    index = _faiss().read_index(str(trained))
    for vectors in _vectors(shard, encoder):
        index.add(vectors)
    _write_index(index, name.with_suffix(".faiss"))


def _vectors(passages: Sequence[Passage], encoder: Encoder) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(passages), BATCH):
        yield encoder.passages([f"{p.title}\n{p.text}" for p in passages[start : start + BATCH]])


def _write_index(index: Any, file: Path) -> None:
    _write_whole(file, lambda path: _faiss().write_index(index, str(path)))


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Under its name only when all of it is there."""
    unfinished = file.with_name(file.name + ".part")
    write(unfinished)
    os.replace(unfinished, file)


# --- searching -----------------------------------------------------------------------------------


class PassageIndex:
    """A built index, opened for searching. Thread-safe for searches."""

    def __init__(self, folder: Path, *, probes: int = 64) -> None:
        """`probes`: lists of an IVF index that are searched."""
        if not (folder / "meta.json").exists():
            raise InvalidInput(f"there is no index in {folder}: build it first")
        self.settings = IndexSettings(**json.loads((folder / "meta.json").read_text()))
        self._shards = [_Shard(file, probes) for file in sorted(folder.glob("shard-*.faiss"))]
        if not self._shards:
            raise InvalidInput(f"the index in {folder} has no shard yet: build it to its end")

    def __len__(self) -> int:
        return sum(len(shard) for shard in self._shards)

    def search(self, vectors: NDArray[np.float32], count: int) -> list[list[Hit]]:
        """The passages nearest to each vector, best first."""
        found: list[list[Hit]] = [[] for _ in vectors]
        first = 0
        for shard in self._shards:
            scores, places = shard.index.search(vectors, min(count, len(shard)))
            for hits, row, where in zip(found, scores.tolist(), places.tolist(), strict=True):
                hits += [
                    Hit(shard.passage(i), score, first + i)
                    for score, i in zip(row, where, strict=True)
                    if i >= 0
                ]
            first += len(shard)
        return [sorted(hits, key=lambda hit: -hit.score)[:count] for hits in found]


class _Shard:
    """One shard's vectors and texts, both mapped into memory."""

    def __init__(self, file: Path, probes: int) -> None:
        faiss = _faiss()
        self.index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        if hasattr(self.index, "nprobe"):
            self.index.nprobe = min(probes, self.index.nlist)
        self._texts = np.memmap(file.with_suffix(".jsonl"), dtype=np.uint8, mode="r")
        self._starts = np.load(file.with_suffix(".npy"), mmap_mode="r")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def passage(self, place: int) -> Passage:
        start, end = self._starts[place : place + 2].tolist()
        return Passage(**json.loads(self._texts[start:end].tobytes()))


def _faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
    except ImportError as error:
        raise AgentLightningError("the index needs FAISS: pip install '.[musique]'") from error
    return faiss
