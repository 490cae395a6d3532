"""Automatic guides and the seam to numpyro's."""
