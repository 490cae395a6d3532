"""The version of the installed distribution, read from its metadata."""

import importlib.metadata


__version__ = importlib.metadata.version("genkit-jax")
