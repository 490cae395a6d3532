"""genkit: probabilistic programming and generative modelling in one house."""

from ._core import Measure as Measure, NonFiniteError as NonFiniteError
