"""Every error of the project, in one place.

    AgentLightningError
    |-- InvalidInput            (also ValueError)  a caller passed something that cannot be used
    |   |-- InvalidReward       a reward that is not a finite number
    |   |-- InvalidTaskFile     a line of a task file that does not parse, named by number
    |   |-- InvalidSpans        a trace body that is not OTLP
    |   `-- PromptTooLong       more prompt tokens than the policy can read
    |-- NotFound                (also LookupError) a rollout, attempt or run that is not there
    |   `-- ModelNotFound       a model name that this server does not serve
    |-- Conflict                a worker reported on an attempt that is no longer its own
    |-- PermissionDenied        a key that is missing, wrong or of the wrong scope
    |-- Unavailable             busy or shutting down; try again after `retry_after_s`
    |-- UpstreamError           another endpoint, that calls are passed on to, gave no answer
    |-- NothingToLearn          an empty batch, a selector without a match, rewards without variance
    `-- StoreError              the database cannot be used

Messages say what happened and what to do. Errors that belong to one rollout are data on its attempt, never
a crash of the run. HTTP statuses are mapped in one place, the server's `http_errors`.
"""

from __future__ import annotations


class AgentLightningError(Exception):
    """Base of all errors raised by Agent Lightning."""


class InvalidInput(AgentLightningError, ValueError):
    """A caller passed something that cannot be used."""


class InvalidReward(InvalidInput):
    """A reward that is not a finite number."""


class InvalidTaskFile(InvalidInput):
    """A task file has a line that does not parse."""


class InvalidSpans(InvalidInput):
    """A trace body is not OTLP."""


class PromptTooLong(InvalidInput):
    """A prompt has more tokens than the policy can read."""


class NotFound(AgentLightningError, LookupError):
    """A rollout, attempt or run that is not there."""


class ModelNotFound(NotFound):
    """A model name that this server does not serve."""


class Conflict(AgentLightningError):
    """A worker reported on an attempt that is no longer its own."""


class PermissionDenied(AgentLightningError):
    """A key is missing, wrong or of the wrong scope."""

    def __init__(self, message: str, *, authenticated: bool = False) -> None:
        super().__init__(message)
        self.authenticated = authenticated
        """Whether the key is known and lacks the scope (HTTP 403), or is missing or unknown (401)."""


class Unavailable(AgentLightningError):
    """The server is busy, updating the policy or shutting down."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UpstreamError(AgentLightningError):
    """Another endpoint, that calls of a routed model name are passed on to, gave no answer."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        code: str = "upstream_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status for the caller: the endpoint's own where the request was at fault."""
        self.code = code
        self.retry_after_s = retry_after_s


class NothingToLearn(AgentLightningError):
    """A batch would carry no gradient; the message says why and what to change."""


class StoreError(AgentLightningError):
    """The database cannot be used."""
