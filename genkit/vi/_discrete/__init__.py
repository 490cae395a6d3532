"""Discrete sites summed out of numpyro models."""
