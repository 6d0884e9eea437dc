"""The store: everything a server remembers, in one SQLite file."""

from .keys import Principal, Scope
from .reads import RolloutFilter
from .store import Store

__all__ = ["Principal", "RolloutFilter", "Scope", "Store"]
