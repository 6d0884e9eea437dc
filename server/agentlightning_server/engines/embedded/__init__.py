"""Embedded engine."""
