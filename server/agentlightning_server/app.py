"""The server as one Starlette application, and running it in the foreground or in a thread.

Not here: what the routes do. Invariant: whatever is mounted is behind the same keys, the same body limit and
the same error mapping.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentlightning.errors import AgentLightningError, Unavailable

from .auth import OPEN_PATHS, AuthMiddleware
from .http_errors import on_error
from .observing import Metrics, Observing, request_tracer
from .routes import store_routes
from .routes.body import too_large
from .routes.operations import operations_routes, templates_of
from .routes.polling import Polling
from .settings import Settings
from .store import Store
from .upkeep import Upkeep

DRAIN_S = 10  # how long requests under way may take when the server stops
START_S = 30.0


def create_app(
    store: Store,
    *,
    gateway: Sequence[BaseRoute] = (),
    settings: Settings,
    open_paths: frozenset[str] = frozenset(),
    on_stop: Callable[[], Awaitable[None]] | None = None,
) -> Starlette:
    """The application. `gateway` are more routes, guarded like ours unless their path is in `open_paths`.

    `on_stop` closes what they hold, on the server's own event loop, after the last request.

    `settings` without an admin key get one as `Settings.with_admin_key` says. The store stays the caller's
    to close. `app.state` has `settings` and `polling`.
    """
    settings = settings.with_admin_key()
    assert settings.admin_key is not None
    polling, metrics = Polling(), Metrics(store)
    tracer = request_tracer(settings.trace_server)
    keeping = Upkeep(store, settings.retention)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        async with keeping.running():
            yield
        if on_stop is not None:
            await on_stop()

    routes = [*gateway, *store_routes(store, settings, polling)]  # tried in this order, so the busiest first
    routes += operations_routes(store, polling, metrics)
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Observing, metrics, templates_of(routes), tracer),
            Middleware(AuthMiddleware, store, settings.admin_key, OPEN_PATHS | open_paths),
            Middleware(_BodyLimit, settings.max_body_bytes),
        ],
        exception_handlers={HTTPException: on_error, AgentLightningError: on_error, Exception: on_error},
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.polling = polling
    return app


class _BodyLimit:
    """Stops reading a body at the limit, for routes that read it themselves."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise too_large(self._limit)
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)


# --- running it ----------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """Releases long polls when it is told to stop, and says when it has started."""

    def __init__(self, config: uvicorn.Config, polling: Polling) -> None:
        super().__init__(config)
        self.ready = threading.Event()
        self._polling = polling
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self.ready.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature is uvicorn's)
        """The first signal ends gracefully, the second at once.

        uvicorn's own would raise the signal again at the end, and so keep the caller from closing the store.
        """
        self.force_exit = self.should_exit
        self.should_exit = True
        self.release()

    def stop(self) -> None:
        """End gracefully. From any thread."""
        self.should_exit = True
        self.release()

    def release(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._polling.close)


def _server(app: Starlette) -> _Server:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # URLs would be fine, but nobody reads a line per span batch
        server_header=False,
        proxy_headers=False,  # nobody asks who the client is
        timeout_graceful_shutdown=DRAIN_S,
        timeout_keep_alive=65,  # longer than a long poll, so that clients rarely meet a closing connection
        ws="none",
    )
    return _Server(config, app.state.polling)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises Unavailable when the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise Unavailable(f"cannot listen on {host}:{port} ({error}): choose another --port") from error
    return sock


def url_of(sock: socket.socket) -> str:
    """The URL under which this machine reaches a listening socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def serve(app: Starlette, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests under way. Blocks the main thread."""
    _server(app).run(sockets=[sock])


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server in a background thread."""

    url: str
    _server: _Server
    _thread: threading.Thread

    def stop(self) -> None:
        """Finish the requests under way, for at most 10 s, and end the thread."""
        self._server.stop()
        self._thread.join(DRAIN_S + 5)

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve_in_thread(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> RunningServer:
    """Start serving and return once requests are answered. Port 0 takes a free one.

    Raises Unavailable when the address is taken or the application does not start.
    """
    sock = bind(host, port)
    server = _server(app)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [sock]}, name="agentlightning-server", daemon=True
    )
    thread.start()
    while not server.ready.wait(0.1):
        if not thread.is_alive():
            raise Unavailable("the server did not start; its log says why")
    return RunningServer(url_of(sock), server, thread)
