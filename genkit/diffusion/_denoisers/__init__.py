"""Denoisers in closed form, from networks, and conditioned on measurements."""
