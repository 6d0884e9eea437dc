"""Agent Lightning."""
