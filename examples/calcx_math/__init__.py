"""Calc-X: an AutoGen agent learns to use its calculator."""
