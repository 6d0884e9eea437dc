"""The store: everything a server remembers, in a SQLite file or a PostgreSQL database."""

from .database import is_url
from .keys import KeyInfo, Principal, Scope
from .reads import RolloutFilter
from .schema import DEFAULT_PROJECT
from .store import Store

__all__ = [
    "DEFAULT_PROJECT",
    "KeyInfo",
    "Principal",
    "RolloutFilter",
    "Scope",
    "Store",
    "is_url",
]
