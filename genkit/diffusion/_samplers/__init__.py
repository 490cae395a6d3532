"""Samplers of diffusion models: tables, Langevin correction, the probability flow."""
