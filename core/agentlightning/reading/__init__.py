"""Reading spans."""
