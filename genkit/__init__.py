"""genkit: probabilistic programming and generative modelling in one house."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from . import io as io
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
from .io import DefinitionError as DefinitionError, load as load, save as save


if TYPE_CHECKING:
    from . import (
        bridge as bridge,
        data as data,
        diffusion as diffusion,
        distill as distill,
        divergence as divergence,
        guidance as guidance,
        mcmc as mcmc,
        nn as nn,
        noise as noise,
        sde as sde,
        vi as vi,
    )
    from .diffusion import Schedule as Schedule
    from .divergence import FDivergence as FDivergence


__version__ = importlib.metadata.version("genkit-jax")

# A room is imported when it is first named: `import genkit` costs little more than JAX itself.
_ON_DEMAND = ("bridge", "data", "diffusion", "distill", "divergence", "guidance", "mcmc", "nn", "noise", "sde", "vi")
_HOMES = {"FDivergence": "divergence", "Schedule": "diffusion"}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"genkit.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"genkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'genkit' has no attribute {name!r}; its rooms are {', '.join(_ON_DEMAND)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND, *_HOMES})
