"""Examples: existing agents that learn."""
