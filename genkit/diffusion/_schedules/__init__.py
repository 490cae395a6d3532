"""Noise schedules and grids of noise levels."""
