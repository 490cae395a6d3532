"""genkit: probabilistic programming and generative modelling in one house."""

import importlib.metadata

from ._core import Measure as Measure, NonFiniteError as NonFiniteError


__version__ = importlib.metadata.version("genkit-jax")
