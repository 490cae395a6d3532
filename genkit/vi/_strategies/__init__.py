"""Gradient strategies for sample sites."""
