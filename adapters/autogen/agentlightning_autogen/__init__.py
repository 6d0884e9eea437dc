"""AutoGen adapter."""
