"""`LightningClient`: the server's REST API with types, over httpx.

Satisfies the trainer bridge's `RolloutService`, so a trainer may run beside the server or far from it.
Not here: sending spans from an agent in the background (`tracing`), and model calls, for which any OpenAI
client serves. Invariants: every error is one of `agentlightning.errors`; only calls that may be repeated
without harm are.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from agentlightning import context, errors, otlp
from agentlightning.types import (
    Attempt,
    AttemptStatus,
    Claim,
    Json,
    Mode,
    Reward,
    Rollout,
    RolloutStatus,
    Span,
)
from agentlightning.wire import (
    Reader,
    attempt_from_json,
    claim_from_json,
    finite,
    reward_to_json,
    rollout_from_json,
    rollout_to_json,
)

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 30.0  # for an answer that is not a long poll
POLL_S = 20.0  # one long poll; the server and most proxies allow 60
RETRIES = 6
BACKOFF_FIRST_S = 0.2
BACKOFF_CAP_S = 5.0
ENQUEUE_PART = 500  # rollouts in one request, so that bodies stay far below the server's limit

_BY_CODE: Mapping[str, type[errors.AgentLightningError]] = {
    "invalid_reward": errors.InvalidReward,
    "context_length_exceeded": errors.PromptTooLong,
    "invalid_task_file": errors.InvalidTaskFile,
    "invalid_spans": errors.InvalidSpans,
    "nothing_to_learn": errors.NothingToLearn,
    "store_error": errors.StoreError,
}
_BY_STATUS: Mapping[int, type[errors.AgentLightningError]] = {
    404: errors.NotFound,
    409: errors.Conflict,
}
_BUSY = (429, 503)


class LightningClient:
    """A connection to one server. Thread-safe. Close it, or use it as a context manager.

    Calls raise PermissionDenied for a wrong key and Unavailable when the server cannot be reached or stays
    busy after several tries.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        project: str | None = None,
        retries: int = RETRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`project` is for the server's own admin key, which is good for all; other keys have theirs."""
        import httpx  # only here: it would double the time of `import agentlightning`

        self.url = url.rstrip("/")
        self.key = key
        self._retries = retries
        self._sleep = sleep
        self._transport_error = httpx.TransportError
        self._http = httpx.Client(
            base_url=self.url,
            headers=_headers(key, project),
            timeout=httpx.Timeout(TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    @classmethod
    def from_env(cls) -> LightningClient:
        """A client of the server in AGENTLIGHTNING_URL, with the key in AGENTLIGHTNING_KEY.

        Raises InvalidInput when one is not set.
        """
        url, key = os.environ.get(context.ENV_URL), os.environ.get(context.ENV_KEY)
        if not url or not key:
            raise errors.InvalidInput(
                f"no server is known: set {context.ENV_URL} and {context.ENV_KEY}, as `agl serve` prints them"
            )
        return cls(url, key)

    def __enter__(self) -> LightningClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # --- rollouts --------------------------------------------------------------------------------

    def enqueue(self, rollouts: Sequence[Rollout]) -> None:
        """Queue rollouts; those whose id exists are left as they are. Raises InvalidInput."""
        for start in range(0, len(rollouts), ENQUEUE_PART):
            part = rollouts[start : start + ENQUEUE_PART]
            self._post("/api/rollouts", {"rollouts": [rollout_to_json(rollout) for rollout in part]})

    def rollout(self, rollout_id: str) -> tuple[Rollout, Sequence[Attempt]]:
        """A rollout and its attempts, first to last. Raises NotFound."""
        read = self._get(f"/api/rollouts/{_quote(rollout_id)}")
        return rollout_from_json(read.raw("rollout")), [
            attempt_from_json(item) for item in read.items("attempts")
        ]

    def rollouts(
        self,
        *,
        run_id: str | None = None,
        status: RolloutStatus | None = None,
        mode: Mode | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> Sequence[Rollout]:
        """A page of rollouts, oldest first; the next page starts `after` the last id of this one."""
        query = {"run_id": run_id, "status": status, "mode": mode, "limit": limit, "after": after}
        read = self._get("/api/rollouts", {k: str(v) for k, v in query.items() if v is not None})
        return [rollout_from_json(item) for item in read.items("rollouts")]

    def attempts(self, rollout_id: str) -> Sequence[Attempt]:
        """The attempts of a rollout, first to last. Raises NotFound."""
        return self.rollout(rollout_id)[1]

    def wait(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> Sequence[Rollout]:
        """Those of the rollouts that are final, as soon as all are, or at the timeout. Raises NotFound."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        wanted = len(set(rollout_ids))
        while True:
            left = POLL_S if deadline is None else max(0.0, min(POLL_S, deadline - time.monotonic()))
            read = self._post(
                "/api/rollouts/wait", {"ids": list(rollout_ids), "timeout_s": left}, poll_s=left
            )
            final = [rollout_from_json(item) for item in read.items("rollouts")]
            if len(final) == wanted or (deadline is not None and time.monotonic() >= deadline):
                return final

    def cancel(self, rollout_ids: Sequence[str]) -> None:
        """End rollouts and their running attempts. Raises NotFound."""
        for rollout_id in rollout_ids:
            self._post(f"/api/rollouts/{_quote(rollout_id)}/cancel", {})

    # --- spans and rewards -----------------------------------------------------------------------

    def spans(self, rollout_id: str, attempt_id: str | None = None) -> Sequence[Span]:
        """Spans of an attempt by start time; by default of the one that succeeded, else the latest."""
        query = {} if attempt_id is None else {"attempt_id": attempt_id}
        read = self._get(f"/api/rollouts/{_quote(rollout_id)}/spans", query)
        return [otlp.span_from_json(item) for item in read.items("spans")]

    def add_spans(self, spans: Sequence[Span]) -> int:
        """Store spans, committed when it returns; how many the server rejected. Raises InvalidSpans."""
        read = self._post("/v1/traces", otlp.export_request(spans))
        return int(read.object("partialSuccess").text("rejectedSpans", "0"))

    def add_reward(
        self,
        rollout_id: str,
        value: float,
        name: str = "reward",
        *,
        target: str | None = None,
        attempt_id: str | None = None,
    ) -> str:
        """Reward an attempt, or its call with span id `target`; the id of the attempt that got it.

        The attempt under way (or the last) gets it unless one is named. Raises InvalidReward, NotFound.
        """
        # The time makes the reward's id, so that a repeated request does not count twice.
        reward = Reward(finite(value, "value"), name, target, time.time_ns())
        body = {**reward_to_json(reward), "attempt_id": attempt_id}
        path = f"/api/rollouts/{_quote(rollout_id)}/rewards"
        try:
            return self._post(path, body).text("attempt_id")
        except errors.NotFound:
            if not _sent_what_waited():
                raise
        return self._post(path, body).text("attempt_id")

    # --- work ------------------------------------------------------------------------------------

    def claim(self, worker_id: str, limit: int = 1, wait_s: float = 0.0) -> Sequence[Claim]:
        """Lease up to `limit` rollouts, waiting up to `wait_s` for the first.

        Not repeated when the answer gets lost; what was leased then returns to the queue after its lease.
        """
        body: dict[str, Json] = {"worker_id": worker_id, "max": limit, "wait_s": wait_s}
        read = self._post("/api/claims", body, poll_s=wait_s, repeatable=False)
        return [claim_from_json(item) for item in read.items("claims")]

    def heartbeat(self, attempt_id: str, worker_id: str) -> bool:
        """Renew a lease; True when the attempt was cancelled. Raises NotFound, Conflict."""
        body: dict[str, Json] = {"worker_id": worker_id}
        return bool(self._post(f"/api/attempts/{_quote(attempt_id)}/heartbeat", body).raw("cancel"))

    def finish(
        self,
        attempt_id: str,
        worker_id: str,
        status: AttemptStatus,
        error: str | None = None,
        rewards: Sequence[Reward] = (),
    ) -> None:
        """End an attempt with its rewards. Raises InvalidReward, NotFound, Conflict."""
        body: dict[str, Json] = {
            "worker_id": worker_id,
            "status": str(status),
            "error": None if error is None else _utf8(error),
            "rewards": [reward_to_json(reward) for reward in rewards],
        }
        self._post(f"/api/attempts/{_quote(attempt_id)}/finish", body)

    # --- the server ------------------------------------------------------------------------------

    def models(self) -> Sequence[str]:
        """Names of the models that the gateway serves."""
        return [Reader(item, "model").text("id") for item in self._get("/v1/models").items("data")]

    def mint_key(self, scope: str, name: str = "", expires_in_s: float = 0.0) -> str:
        """A new key of scope "admin", "trainer", "runner" or "reporter"; needs an admin's."""
        body: dict[str, Json] = {"scope": scope, "name": name, "expires_in_s": expires_in_s}
        return self._post("/api/keys", body, repeatable=False).text("key")

    def list_keys(self) -> Sequence[Mapping[str, Json]]:
        """The project's keys, each with id, name, scope, created_ns and expires_ns; needs an admin's."""
        return cast("Sequence[Mapping[str, Json]]", self._get("/api/keys").items("keys"))

    def revoke_key(self, key_id: str) -> None:
        """The key no longer works; needs an admin's. Raises NotFound."""
        self._send(lambda: self._http.delete(f"/api/keys/{_quote(key_id)}"), repeatable=True)

    def healthy(self) -> bool:
        """Whether the server answers and its database works. One try, never raises."""
        try:
            return self._http.get("/readyz", timeout=5.0).status_code == 200
        except self._transport_error:
            return False

    # --- plumbing --------------------------------------------------------------------------------

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> Reader:
        return self._send(lambda: self._http.get(path, params=dict(query or {})), repeatable=True)

    def _post(
        self, path: str, body: Mapping[str, Any], *, poll_s: float = 0.0, repeatable: bool = True
    ) -> Reader:
        timeout_s = TIMEOUT_S + poll_s
        return self._send(lambda: self._http.post(path, json=body, timeout=timeout_s), repeatable=repeatable)

    def _send(self, send: Callable[[], httpx.Response], *, repeatable: bool) -> Reader:
        tries = 1 + self._retries
        for number in range(1, tries + 1):
            try:
                response = send()
            except self._transport_error as error:
                if number == tries or not (repeatable or _never_arrived(error)):
                    raise errors.Unavailable(
                        f"{self.url} cannot be reached ({error or type(error).__name__}): "
                        "is the server running?"
                    ) from error
                wait_s = 0.0
            except (ValueError, TypeError) as error:
                raise errors.InvalidInput(f"cannot be written as JSON: {error}") from error
            else:
                if response.is_success:
                    return Reader(response.json(), "answer")
                if response.status_code not in _BUSY or number == tries:
                    raise error_of(response)
                wait_s = _retry_after_s(response)
            self._sleep(max(wait_s, _backoff_s(number)))
        raise AssertionError("unreachable")


def _headers(key: str, project: str | None) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return headers if project is None else {**headers, "x-agentlightning-project": project}


def _sent_what_waited() -> bool:
    """Send this process's waiting spans: a run that just ended may be among them. False where none can be."""
    from agentlightning.tracing import get_tracer

    tracer = get_tracer()
    return tracer.enabled and tracer.flush()


def error_of(response: httpx.Response) -> errors.AgentLightningError:
    """The error that an answer stands for."""
    message, code = _message(response)
    status = response.status_code
    if status in (401, 403):
        return errors.PermissionDenied(message, authenticated=status == 403)
    if (kind := _BY_CODE.get(code)) or (kind := _BY_STATUS.get(status)):
        return kind(message)
    if status in _BUSY:
        return errors.Unavailable(message, retry_after_s=_retry_after_s(response) or 1.0)
    if 400 <= status < 500:
        return errors.InvalidInput(message)
    return errors.AgentLightningError(message)


def _message(response: httpx.Response) -> tuple[str, str]:
    try:
        error = Reader(response.json(), "answer").object("error")
        return error.text("message"), error.text("code", "")
    except ValueError:  # not our server, or a proxy in between
        return f"HTTP {response.status_code} from {response.url}: {response.text[:300]}", ""


def _never_arrived(error: Exception) -> bool:
    import httpx

    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _backoff_s(number: int) -> float:
    """Doubling, with up to half of it random, so that clients of a restarted server do not come in step."""
    plain = min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2 ** (number - 1))
    return plain * (0.5 + random.random() / 2)


def _quote(part: str) -> str:
    from urllib.parse import quote

    return quote(part, safe="")


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
