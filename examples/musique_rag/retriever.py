"""The retriever: an index with its encoder, over HTTP, so that the agent's processes need neither.

    python -m examples.musique_rag.retriever build INDEX PASSAGES... [--factory SQ8] [--encoder bge]
    python -m examples.musique_rag.retriever serve INDEX [--port 8900]

`build` goes on where it stopped. `POST /search {"query": ..., "count": 3}` answers
`{"passages": [{"title", "text", "score"}, ...]}`.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from agentlightning.errors import InvalidInput
from examples.musique_rag import ENV_RETRIEVER
from examples.musique_rag.encoders import Encoder, load_encoder
from examples.musique_rag.index import FLAT, Hit, PassageIndex, build_index
from examples.musique_rag.passages import read_passages

MAX_COUNT = 100
REMEMBERED = 10_000  # queries; the rollouts of a group ask alike


class Retriever:
    """Finds passages by meaning. Thread-safe."""

    def __init__(self, index: PassageIndex, encoder: Encoder) -> None:
        if encoder.name != index.settings.encoder:
            raise InvalidInput(
                f"the index was built with {index.settings.encoder} and the encoder is {encoder.name}: "
                "build another index"
            )
        self._index, self._encoder = index, encoder
        self._lock = threading.Lock()
        self._found = lru_cache(REMEMBERED)(self._find)

    @property
    def encoder_name(self) -> str:
        """What the vectors are made with."""
        return self._encoder.name

    def search(self, query: str, count: int = 3) -> Sequence[Hit]:
        """The passages that are nearest to the query, best first."""
        return self._found(query, count)

    def _find(self, query: str, count: int) -> Sequence[Hit]:
        with self._lock:
            vectors = self._encoder.queries([query])
        return self._index.search(vectors, count)[0]


def application(retriever: Retriever) -> Starlette:
    """The retriever as a web application."""

    async def search(request: Request) -> JSONResponse:
        match await _json(request):
            case {"query": str(query), **others} if query.strip():
                count = others.get("count", 3)
            case _:
                return JSONResponse({"error": 'send {"query": "a text", "count": 3}'}, 400)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_COUNT:
            return JSONResponse({"error": f"count must be from 1 to {MAX_COUNT}"}, 400)
        hits = await run_in_threadpool(retriever.search, query, count)
        found = [
            {"title": hit.passage.title, "text": hit.passage.text, "score": round(hit.score, 4)}
            for hit in hits
        ]
        return JSONResponse({"passages": found})

    return Starlette(routes=[Route("/search", search, methods=["POST"])])


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except ValueError:
        return None


@contextmanager
def serving(retriever: Retriever, host: str = "127.0.0.1", port: int = 0) -> Generator[str]:
    """Serve a retriever from a thread of this process while the block runs; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(application(retriever), log_level="warning"))
    with socket.create_server((host, port)) as sock:
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [sock]}, name="retriever", daemon=True
        )
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://{host}:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def open_retriever(folder: Path, encoder: str = "auto", *, probes: int = 64) -> Retriever:
    """The retriever of a built index."""
    return Retriever(PassageIndex(folder, probes=probes), load_encoder(encoder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build")
    build.add_argument("index", type=Path)
    build.add_argument("passages", type=Path, nargs="+")
    build.add_argument("--factory", default=FLAT)
    build.add_argument("--encoder", default="auto")
    build.add_argument("--shard-size", type=int, default=100_000)
    build.add_argument("--training-passages", type=int, default=100_000)
    serve = commands.add_parser("serve")
    serve.add_argument("index", type=Path)
    serve.add_argument("--encoder", default="auto")
    serve.add_argument("--probes", type=int, default=64, help="lists of an IVF index that are searched")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8900)
    args = parser.parse_args()
    if args.command == "build":
        began = time.monotonic()
        count = build_index(
            lambda: read_passages(args.passages),
            args.index,
            load_encoder(args.encoder),
            factory=args.factory,
            shard_size=args.shard_size,
            training_passages=args.training_passages,
            progress=lambda count: print(f"{count} passages, {time.monotonic() - began:.0f} s", flush=True),
        )
        print(json.dumps({"index": str(args.index), "passages": count}))
        return
    with serving(open_retriever(args.index, args.encoder, probes=args.probes), args.host, args.port) as url:
        print(f"{ENV_RETRIEVER}={url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
