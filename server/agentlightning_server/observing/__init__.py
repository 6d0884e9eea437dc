"""What an operator sees of a running server: logs, metrics, traces. Never a prompt, an answer or a key."""

from .logs import configure_logs
from .metrics import Metrics
from .middleware import Observing
from .traces import request_tracer

__all__ = ["Metrics", "Observing", "configure_logs", "request_tracer"]
