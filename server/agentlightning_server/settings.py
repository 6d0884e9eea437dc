"""What a server can be told, one frozen dataclass; every field can come from the environment.

Environment variables are `AGENTLIGHTNING_` plus the field's name in capitals. Invariant: a server that can be
reached from another machine always has a key that somebody chose.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agentlightning.errors import InvalidInput

ENV_PREFIX = "AGENTLIGHTNING_"
KEY_FILE = "admin.key"
Durability = Literal["full", "normal"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server process."""

    host: str = "127.0.0.1"
    """Address to bind. Anything beyond loopback needs `admin_key`."""
    port: int = 8700
    """0 takes any free port."""
    database: Path = Path("agentlightning.db")
    """SQLite file. Its folder is the data folder."""
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

    @property
    def data_dir(self) -> Path:
        return self.database.parent

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
    if field in ("port", "max_body_mib"):
        try:
            return int(text)
        except ValueError:
            raise InvalidInput(f"{variable}={text!r} is not a whole number") from None
    if field == "durability" and text not in ("full", "normal"):
        raise InvalidInput(f"{variable}={text!r} must be 'full' or 'normal'")
    return Path(text) if field in ("database", "upstreams") else text


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
