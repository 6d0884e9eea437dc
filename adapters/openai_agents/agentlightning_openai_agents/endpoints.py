"""What must differ where the SDK's requests go to our server instead of OpenAI.

Our server speaks chat completions and the SDK asks for the Responses API by default; and the key in
OPENAI_API_KEY is our server's then, with which the SDK would send its own traces to api.openai.com.

Invariant: nothing here has an effect on clients and keys of other servers.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agents.models import _openai_shared

from agentlightning.context import ENV_KEY
from agentlightning.openai_sdk import is_our_server
from agentlightning.tracing.guard import guarded


def wrap_get_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """`OpenAIProvider.get_model`: a model at our server is asked for chat completions."""

    @functools.wraps(original)
    def get_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(_speaking_chat(self) or self, *args, **kwargs)

    return get_model


@guarded
def _speaking_chat(provider: Any) -> Any:
    if not provider._use_responses:
        return None
    try:
        client = provider._get_client()
    except Exception:  # no key: the provider says so itself
        return None
    if not is_our_server(str(client.base_url)):
        return None
    twin = copy.copy(provider)
    twin._use_responses = False
    return twin


def wrap_export(original: Callable[..., None]) -> Callable[..., None]:
    """`BackendSpanExporter._export_with_deadline`: our key is for our server only."""

    @functools.wraps(original)
    def export_with_deadline(self: Any, items: list[Any], *args: Any, **kwargs: Any) -> None:
        if _has_our_key(self):
            items = [item for item in items if getattr(item, "tracing_api_key", None)]
            if not items:
                return
        original(self, items, *args, **kwargs)

    return export_with_deadline


@guarded
def _has_our_key(exporter: Any) -> bool:
    return not is_our_server(exporter.endpoint) and exporter.api_key in set(_our_keys())


def _our_keys() -> Iterator[str]:
    """The keys that this process sends to our server."""
    keys: Sequence[str | None] = [os.environ.get(ENV_KEY)]
    client = _openai_shared.get_default_openai_client()
    if client is not None and is_our_server(str(client.base_url)):
        keys = [*keys, client.api_key]
    if is_our_server(os.environ.get("OPENAI_BASE_URL", "")):
        keys = [*keys, os.environ.get("OPENAI_API_KEY"), _openai_shared.get_default_openai_key()]
    return (key for key in keys if key)
