"""The one patch of the OpenAI SDK: a request to our server says to which rollout and span it belongs.

It wraps `_prepare_options`, the SDK's own hook for mutating a request, on the sync and async clients (openai
2.45 to 3.x); that covers streams, `.parse()` and every framework which calls the SDK. Frameworks pass no
per-request headers, and what their events carry of a response is too little to find it again (no id in
LangChain's and AutoGen's streams), hence a patch.

Invariant: our headers go to the origin of the active rollout's base URL or of the configured server, never to
another host; a request is sent even where this fails.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from agentlightning import semconv
from agentlightning.context import ActiveRollout, current_rollout, open_span
from agentlightning.tracing.guard import record_failure
from agentlightning.tracing.patching import Patches
from agentlightning.tracing.process import server_url

TRACEPARENT: Final = "traceparent"
_HOOK: Final = "_prepare_options"
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_owners: Final[set[str]] = set()
_patches: Final = Patches()


def install(owner: str = "agentlightning") -> bool:
    """Patch the SDK; False when it is not installed. `owner` is who asks: several may, independently."""
    try:
        import openai  # pyright: ignore[reportUnusedImport]  # noqa: F401
    except ImportError:
        return False
    return install_if_loaded(owner)


def install_if_loaded(owner: str = "agentlightning") -> bool:
    """Like `install`, for callers that must not pay for importing an SDK which the agent does not use."""
    openai = sys.modules.get("openai")
    base = sys.modules.get("openai._base_client")
    if openai is None or base is None:
        return False
    _owners.add(owner)
    if not _patches:
        for client, hook in (
            (base.SyncAPIClient, _sync_hook),
            (openai.OpenAI, _sync_hook),
            (base.AsyncAPIClient, _async_hook),
            (openai.AsyncOpenAI, _async_hook),
        ):
            if _HOOK in client.__dict__ and not _calls_base(client.__dict__[_HOOK]):
                _patches.wrap(client, _HOOK, hook)
    return True


def _calls_base(hook: Any) -> bool:
    """Whether a subclass's hook ends in the base class's, which is patched."""
    code = getattr(hook, "__code__", None)
    return code is not None and "super" in code.co_names


def uninstall(owner: str = "agentlightning") -> None:
    """Take the patch back once nobody who installed it needs it any more."""
    _owners.discard(owner)
    if not _owners:
        _patches.undo()


def _sync_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare(self: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_headers(self, original(self, options, *args, **kwargs))

    return prepare


def _async_hook(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def prepare(self: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_headers(self, await original(self, options, *args, **kwargs))

    return prepare


def _with_headers(client: Any, options: Any) -> Any:
    """The request options with our headers, where they go to our server.

    The SDK hands its hook a copy of its own for each try, so the options are changed and not copied again.
    """
    try:
        url: str = options.url
        ours = request_headers(url if "://" in url else str(client.base_url)) if _owners else {}
        if ours:
            given: Any = options.headers
            options.headers = {**given, **ours} if hasattr(given, "keys") else ours  # else "not given"
    except Exception as error:
        record_failure("agentlightning.openai_sdk", error)
    return options


def request_headers(url: str) -> dict[str, str]:
    """Our headers for a request to this URL: none unless it goes to our server."""
    active = current_rollout()
    span = open_span()
    if active is None and span is None:
        return {}
    if not _is_ours(url, active):
        return {}
    headers = dict[str, str]()
    if span is not None:
        traceparent = span.traceparent
        headers = {TRACEPARENT: traceparent, semconv.HEADER_TRACEPARENT: traceparent}
    if active is not None:
        headers[semconv.HEADER_ROLLOUT] = active.rollout_id
        headers[semconv.HEADER_ATTEMPT] = active.attempt_id
    return headers


def is_our_server(url: str) -> bool:
    """Whether it has the origin of the active rollout's base URL, or of the configured server."""
    return _is_ours(url, current_rollout())


def _is_ours(url: str, active: ActiveRollout | None) -> bool:
    target = _origin(url)
    return target is not None and target in (
        _origin(active.base_url if active else ""),
        _origin(server_url()),
    )


@functools.lru_cache(maxsize=64)
def _origin(url: str) -> tuple[str, str, int | None] | None:
    if not url:
        return None
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme)
