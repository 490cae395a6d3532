"""genkit: probabilistic programming and generative modelling in one house."""

import importlib.metadata

from ._core import (
    CorruptFileError as CorruptFileError,
    Fitted as Fitted,
    Interrupted as Interrupted,
    Measure as Measure,
    NonFiniteError as NonFiniteError,
    Objective as Objective,
    Phase as Phase,
    Problem as Problem,
    Recipe as Recipe,
    SaveError as SaveError,
    fit as fit,
)
from .io import DefinitionError as DefinitionError, load as load, save as save


__version__ = importlib.metadata.version("genkit-jax")
