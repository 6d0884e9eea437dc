"""The gateway: an OpenAI-compatible endpoint in front of an engine that records exactly what was sampled."""

from agentlightning_server.gateway.routes import gateway_routes
from agentlightning_server.gateway.service import Gateway, GatewaySettings

__all__ = ["Gateway", "GatewaySettings", "gateway_routes"]
