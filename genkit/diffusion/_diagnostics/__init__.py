"""Errors of samplers without Monte Carlo."""
