"""genkit: probabilistic programming and generative modelling in one house."""

import importlib.metadata

from . import (
    bridge as bridge,
    data as data,
    diffusion as diffusion,
    divergence as divergence,
    guidance as guidance,
    io as io,
    mcmc as mcmc,
    nn as nn,
    noise as noise,
    sde as sde,
    vi as vi,
)
from ._core import (
    AbstractSampler as AbstractSampler,
    CorruptFileError as CorruptFileError,
    Denoiser as Denoiser,
    Draws as Draws,
    Fitted as Fitted,
    Guidance as Guidance,
    Interrupted as Interrupted,
    Measure as Measure,
    NonFiniteError as NonFiniteError,
    Objective as Objective,
    Phase as Phase,
    Posterior as Posterior,
    Problem as Problem,
    Recipe as Recipe,
    Sampler as Sampler,
    SaveError as SaveError,
    Table as Table,
    fit as fit,
    infer as infer,
    sample as sample,
)
from .diffusion import Schedule as Schedule
from .divergence import FDivergence as FDivergence
from .io import DefinitionError as DefinitionError, load as load, save as save


__version__ = importlib.metadata.version("genkit-jax")
