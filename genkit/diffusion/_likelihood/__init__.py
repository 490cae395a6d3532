"""Densities under the probability flow."""
