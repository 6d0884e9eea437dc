"""The gateway: an OpenAI-compatible endpoint in front of an engine that records exactly what was sampled."""

from agentlightning_server.gateway.routes import gateway_routes
from agentlightning_server.gateway.service import Gateway, GatewaySettings
from agentlightning_server.gateway.upstreams import Upstream, Upstreams, load_upstreams

__all__ = ["Gateway", "GatewaySettings", "Upstream", "Upstreams", "gateway_routes", "load_upstreams"]
