"""Other models of a flow, a hosted API or another server: a routing table by model name, and who asks them.

    checker = {"url": "https://api.openai.com/v1", "model": "gpt-4.1-mini", "key_env": "OPENAI_API_KEY"}

Not here: what is recorded of an answer (`recording`), and streams (`responses`): an endpoint is always asked
for the whole answer. Invariants: a request goes out as it came in, but for its model's name and what concerns
streams; the endpoint's key is read from the environment, goes to that endpoint alone and is in no message; no
header of the agent's request, its key least of all, is passed on.
"""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp
import orjson

from agentlightning.errors import InvalidInput, UpstreamError
from agentlightning.types import JsonObject

CONNECT_S = 10.0  # to reach an endpoint; the answer itself may take the upstream's own `timeout_s`
MAX_WAIT_S = 86_400.0  # of what an endpoint asks its caller to wait
MAX_BODY_BYTES = 20 << 20  # of an answer; the longest that models give have some megabytes with logprobs
MAX_CHOICES = 128  # OpenAI's own limit of n
_FIELDS: Final = ("url", "model", "key_env", "timeout_s")
_STREAMING: Final = frozenset({"stream", "stream_options"})


@dataclass(frozen=True, slots=True)
class Upstream:
    """An OpenAI-compatible endpoint that answers one routed model name."""

    url: str
    """Its base URL, "/v1" included."""
    model: str
    """What the endpoint itself calls the model."""
    key: str | None = field(default=None, repr=False)
    key_env: str | None = None
    """The environment variable that the key came from, to name in errors."""
    timeout_s: float = 600.0
    """Seconds that one answer may take; the OpenAI SDK's own limit."""


# --- the table -----------------------------------------------------------------------------------


def load_upstreams(path: Path, env: Mapping[str, str] | None = None) -> dict[str, Upstream]:
    """Upstreams by model name, from a TOML or JSON file. Raises InvalidInput naming file, entry and field."""
    source = os.environ if env is None else env
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the upstreams in {path}: {error}") from error
    try:
        table: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise InvalidInput(f"{path} is not {kind}: {error}") from error
    if not isinstance(table, Mapping):
        raise InvalidInput(f"{path} must map model names to upstreams")
    entries = cast("Mapping[str, Any]", table).items()
    return {name: _upstream(name, entry, f"{path}, upstream {name!r}", source) for name, entry in entries}


def _upstream(name: str, entry: Any, where: str, env: Mapping[str, str]) -> Upstream:
    if not isinstance(entry, Mapping):
        raise InvalidInput(f"{where} must have a url; model, key_env and timeout_s if need be")
    fields = cast("Mapping[str, Any]", entry)
    if unknown := sorted(fields.keys() - set(_FIELDS)):
        raise InvalidInput(f"{where} has unknown fields {', '.join(unknown)}: it takes {', '.join(_FIELDS)}")
    url, model, key_env = fields.get("url"), fields.get("model", name), fields.get("key_env")
    if not isinstance(url, str) or not _is_base_url(url):
        raise InvalidInput(
            f"{where}: url must be a base URL like https://api.openai.com/v1, without user, query or "
            "/chat/completions"
        )
    if not isinstance(model, str) or not model:
        raise InvalidInput(f"{where}: model must be the name that the endpoint knows the model by")
    return Upstream(
        url=url.rstrip("/"),
        model=model,
        key=None if key_env is None else _key(key_env, where, env),
        key_env=key_env,
        timeout_s=_seconds(fields.get("timeout_s", 600.0), where),
    )


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, say
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    return (
        valid and plain and parts.scheme in ("http", "https") and not url.rstrip("/").endswith("/completions")
    )


def _key(variable: Any, where: str, env: Mapping[str, str]) -> str:
    if not isinstance(variable, str) or not variable:
        raise InvalidInput(f"{where}: key_env must be the name of an environment variable")
    key = env.get(variable, "").strip()
    if (
        not key
    ):  # the value that was given may be the key itself, so it is not repeated where it looks like one
        shown = variable if variable.isidentifier() else "that key_env names"
        raise InvalidInput(f"{where}: the environment variable {shown} is not set: export the endpoint's key")
    return key


def _seconds(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InvalidInput(f"{where}: timeout_s must be a number of seconds above zero, got {value!r}")
    return float(value)


# --- asking --------------------------------------------------------------------------------------


class Upstreams:
    """The table and the connections to its endpoints; used on the server's event loop only."""

    def __init__(self, table: Mapping[str, Upstream] | None = None) -> None:
        self._table = dict(table or {})
        self._session: aiohttp.ClientSession | None = None

    @property
    def models(self) -> list[str]:
        """The routed names."""
        return list(self._table)

    def __contains__(self, model: object) -> bool:
        return isinstance(model, str) and model in self._table

    async def complete(self, fields: JsonObject) -> dict[str, Any]:
        """The `chat.completion` that the upstream of `fields["model"]` answers a request with.

        Raises UpstreamError. Cancelling closes the connection to the endpoint.
        """
        name = str(fields["model"])
        upstream = self._table[name]
        where = f"the upstream of '{name}' ({upstream.url})"
        passed = {key: value for key, value in fields.items() if key not in _STREAMING}
        try:
            async with self._connected().post(
                f"{upstream.url}/chat/completions",
                data=orjson.dumps({**passed, "model": upstream.model}),
                headers=_headers(upstream),
                timeout=aiohttp.ClientTimeout(upstream.timeout_s, sock_connect=CONNECT_S),
                allow_redirects=False,  # they would take the key elsewhere
            ) as response:
                text = await _read(response, where)
        except TimeoutError as error:
            slow = f"{where} gave no answer within {upstream.timeout_s:g} s"
            raise UpstreamError(slow, status=504, code="upstream_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"{where} gave no answer: {_without_key(error, upstream)}") from error
        if response.status != 200:
            raise _refused(where, upstream, response.status, response.headers, text)
        return _completion(where, text)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:  # made on the loop that uses it; how many calls run is for agents to say
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _read(response: aiohttp.ClientResponse, where: str) -> bytes:
    """The whole body, up to a limit, for an endpoint gone wild must not take this server's memory."""
    if (response.content_length or MAX_BODY_BYTES + 1) <= MAX_BODY_BYTES and not response.headers.get(
        "content-encoding"
    ):
        return await response.read()
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise UpstreamError(f"{where} answered with more than {MAX_BODY_BYTES >> 20} MiB")
    return bytes(body)


def _headers(upstream: Upstream) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    return headers if upstream.key is None else {**headers, "authorization": f"Bearer {upstream.key}"}


def _completion(where: str, text: bytes) -> dict[str, Any]:
    """The answer, with an id and choice indices where it came without."""
    try:
        body: Any = orjson.loads(text)
        for index, choice in enumerate(body["choices"]):
            calls: Any = choice["message"].get("tool_calls") or []
            if not isinstance(calls, list) or not all(isinstance(c, dict) for c in cast("list[Any]", calls)):
                raise ValueError("tool_calls")
            if not isinstance(choice.get("finish_reason"), str | None):
                raise ValueError("finish_reason")
            choice.setdefault("index", index)
        dict(body.get("usage") or {})
        if not 1 <= len(body["choices"]) <= MAX_CHOICES:
            raise ValueError("choices")
        body["id"] = str(body.get("id") or f"chatcmpl-{uuid4().hex}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UpstreamError(f"{where} answered with something that is no chat completion") from error
    return body


def _refused(
    where: str, upstream: Upstream, status: int, headers: Mapping[str, str], text: bytes
) -> UpstreamError:
    """The error for a status: the caller's own fault is told as it was, everything else is a bad gateway."""
    retry_after_s = _retry_after_s(headers)
    if status in (401, 403):  # about our key, which the caller neither knows nor can mend
        named = f"see to {upstream.key_env}" if upstream.key_env else "give it a key_env"
        return UpstreamError(f"{where} refused its key with status {status}: {named}")
    message, code = _error_of(text)
    told = f"{where} answered with status {status}: {_without_key(message, upstream)}"
    if 400 <= status < 500:
        return UpstreamError(told, status=status, code=code, retry_after_s=retry_after_s)
    timed_out = status in (408, 504)
    return UpstreamError(told, status=504 if timed_out else 502, retry_after_s=retry_after_s)


def _error_of(text: bytes) -> tuple[str, str]:
    """(message, code) of an error body: OpenAI's shape, FastAPI's, or whatever text there is."""
    code = "upstream_error"
    try:
        body: Any = orjson.loads(text)
        error = body.get("error") or body
        if isinstance(error, str):
            return error, code
        return str(error.get("message") or error.get("detail") or error), str(error.get("code") or code)
    except (ValueError, AttributeError):
        return text[:500].decode(errors="replace").strip() or "no explanation", code


def _without_key(message: object, upstream: Upstream) -> str:
    text = str(message) or type(message).__name__
    return text.replace(upstream.key, "[key]") if upstream.key else text


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `Retry-After-Ms` or `Retry-After` in seconds or as a date; within a day."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif (value := headers.get("retry-after", "")).strip().replace(".", "", 1).isdigit():
            seconds = float(value)
        else:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:  # none was given, or it cannot be read
        return None
    return min(max(0.0, seconds), MAX_WAIT_S)
