"""The runner: takes rollouts from the server and runs the user's agent on them."""

from agentlightning.runner.agent import Outcome, RolloutContext, load
from agentlightning.runner.worker import Worker

__all__ = ["Outcome", "RolloutContext", "Worker", "load"]
