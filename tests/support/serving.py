"""A real server with a real engine around a tiny model, for tests that need one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from agentlightning_server.engines.base import Engine
from agentlightning_server.engines.embedded.engine import EmbeddedEngine
from agentlightning_server.engines.embedded.settings import EmbeddedSettings
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.settings import Settings
from agentlightning_server.training.local import LocalServer, local_server


def tiny_engine(folder: Path, **settings: object) -> EmbeddedEngine:
    """An engine around a tiny random model with a byte-level ChatML tokenizer."""
    model = make_tiny_model(folder / "tiny")
    values: dict[str, object] = {"context_length": 1024, "threads": 1, **settings}
    return EmbeddedEngine(EmbeddedSettings(model=str(model), **values))  # type: ignore[arg-type]


@contextmanager
def serving(engine: Engine, folder: Path) -> Generator[LocalServer]:
    """The engine behind the gateway, with its store in `folder`."""
    with local_server(engine, Settings(port=0, database=folder / "store.db")) as server:
        yield server
