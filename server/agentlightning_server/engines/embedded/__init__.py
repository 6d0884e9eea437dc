"""The embedded engine: a transformers model served and trained inside the server's process.

    settings   every knob                         worker     the one thread that computes
    loading    find and load a model              decoding   continuous batching over
    policy     the weights, trained and served      cache      stored keys and values, with
    updates    one optimiser update over              attention  the hook into transformers,
      packing    prefix trees,                        placement  shared prefixes,
      scoring    passes over them,                    sampling   draws, and
      losses     the clipped policy loss, and         lanes      requests under way
      critic     the value head                       memory     of draws, for late requests
    checkpoint exact resume, export                 tiny       a random little model for tests

Only here may torch be imported at module level; this very module does not, so that names resolve cheaply.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import EmbeddedEngine
    from .settings import DEFAULT_MODEL, EmbeddedSettings

# Read when torch loads its OpenMP runtime. Threads that spin while they wait make small products 12 times
# slower (measured, 2 cores) as soon as another process, an agent say, wants a core too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["DEFAULT_MODEL", "EmbeddedEngine", "EmbeddedSettings"]

_HOMES = {"EmbeddedEngine": "engine", "DEFAULT_MODEL": "settings", "EmbeddedSettings": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
