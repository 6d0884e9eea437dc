"""From stored spans to episodes: dialects, the join of adapter and gateway spans, transitions in call order.

Everything here is a pure function of stored spans, so a stored run can be read again at any time.
"""

from agentlightning.reading.episodes import read_episode
from agentlightning.reading.join import join_calls
from agentlightning.reading.views import TraceView, read_trace

__all__ = ["TraceView", "join_calls", "read_episode", "read_trace"]
