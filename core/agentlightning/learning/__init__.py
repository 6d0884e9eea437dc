"""From episodes to batches."""
