"""What a server can be told, one frozen dataclass; every field can come from the environment.

Environment variables are `AGENTLIGHTNING_` plus the field's name in capitals. Invariant: a server that can be
reached from another machine always has a key that somebody chose.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from agentlightning.errors import InvalidInput

from .retention import Retention

ENV_PREFIX = "AGENTLIGHTNING_"
KEY_FILE = "admin.key"
Durability = Literal["full", "normal"]
LogFormat = Literal["text", "json"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server process."""

    host: str = "127.0.0.1"
    """Address to bind. Anything beyond loopback needs `admin_key`."""
    port: int = 8700
    """0 takes any free port."""
    database: Path | str = Path("agentlightning.db")
    """SQLite file, or URL of a PostgreSQL database (postgresql://user:password@host/name)."""
    data: Path | None = None
    """Data folder, for the key that is made on loopback. None: the SQLite file's folder."""
    admin_key: str | None = None
    """Key of the admin scope. None on loopback: one is made and written to `<data folder>/admin.key`."""
    durability: Durability = "full"
    """"full" survives power loss; "normal" only a killed process, and is up to twice as fast."""
    model: str = "policy"
    """Name of the policy that workers are told to ask the gateway for."""
    upstreams: Path | None = None
    """TOML or JSON file of the models that other endpoints answer; see `gateway.upstreams`."""
    max_body_mib: int = 20
    """Largest request body, compressed and inflated alike; the OpenTelemetry Collector's default."""
    retain_days: float | None = None
    """Days after its end that a rollout is kept; None for ever. `store.retention` says what always stays."""
    retain_gib: float | None = None
    """Size of the database above which the oldest rollouts go; None for no limit."""
    log_format: LogFormat = "text"
    """"text" for people, "json" for machines; prompts and keys are in neither."""
    log_level: str = "warning"
    """"info" logs every request: its route, status and time."""
    trace_server: bool = False
    """Send OpenTelemetry spans of the server's own requests to OTEL_EXPORTER_OTLP_ENDPOINT."""

    @property
    def data_dir(self) -> Path:
        if self.data is not None:
            return self.data
        return self.database.parent if isinstance(self.database, Path) else Path("agentlightning-data")

    @property
    def retention(self) -> Retention:
        """What old rollouts to let go."""
        return Retention(
            None if self.retain_days is None else int(self.retain_days * 86_400e9),
            None if self.retain_gib is None else int(self.retain_gib * (1 << 30)),
        )

    @property
    def max_body_bytes(self) -> int:
        return self.max_body_mib * 1024 * 1024

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **overrides: object) -> Settings:
        """Read the environment; `overrides` that are not None win. Raises InvalidInput with the variable."""
        source = os.environ if env is None else env
        values: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            name = ENV_PREFIX + field.name.upper()
            if (text := source.get(name)) is not None:
                values[field.name] = _parse(name, field.name, text)
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)  # pyright: ignore[reportArgumentType] - _parse gives each field its type

    def with_admin_key(self) -> Settings:
        """These settings with an admin key: the one given, else the one on disk, else a new one on loopback.

        Raises InvalidInput when the address is not loopback and no key was given.
        """
        if self.admin_key:
            return self
        if not is_loopback(self.host):
            raise InvalidInput(
                f"refusing to listen on {self.host} without a key, since other machines can reach it: "
                f"set {ENV_PREFIX}ADMIN_KEY or pass --admin-key, or listen on 127.0.0.1"
            )
        return dataclasses.replace(self, admin_key=_key_on_disk(self.data_dir / KEY_FILE))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse(variable: str, field: str, text: str) -> object:
    if field in _NUMBERS:
        try:
            return _NUMBERS[field](text)
        except ValueError:
            kind = "a whole number" if _NUMBERS[field] is int else "a number"
            raise InvalidInput(f"{variable}={text!r} is not {kind}") from None
    if field in CHOICES and text not in CHOICES[field]:
        raise InvalidInput(f"{variable}={text!r} must be {' or '.join(map(repr, CHOICES[field]))}")
    if field == "trace_server":
        return text == "true"
    if field == "database" and "://" in text:
        return text
    return Path(text) if field in ("database", "data", "upstreams") else text


_NUMBERS: Final[Mapping[str, Callable[[str], float]]] = {
    "port": int,
    "max_body_mib": int,
    "retain_days": float,
    "retain_gib": float,
}
CHOICES: Final[Mapping[str, Sequence[str]]] = {
    "durability": ("full", "normal"),
    "log_format": ("text", "json"),
    "log_level": ("debug", "info", "warning", "error"),
    "trace_server": ("true", "false"),
}


def _key_on_disk(path: Path) -> str:
    if path.exists():
        if key := path.read_text().strip():
            return key
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    key = new_key("admin")
    # Created with its final mode: a chmod afterwards would leave a moment in which others can read it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
    return key


def new_key(scope: str) -> str:
    """A fresh API key of 256 random bits; the prefix says what it is, so that a leak can be recognised."""
    return f"agl-{scope}-{secrets.token_urlsafe(32)}"
