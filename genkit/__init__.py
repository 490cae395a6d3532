"""genkit: generative and probabilistic modeling in JAX and Equinox."""

from typing import TYPE_CHECKING

from genkit._core._lazy import attach as _attach


if TYPE_CHECKING:
    from genkit import (
        bridge as bridge,
        cli as cli,
        data as data,
        diffusion as diffusion,
        distill as distill,
        distributions as distributions,
        divergence as divergence,
        guidance as guidance,
        inference as inference,
        io as io,
        mcmc as mcmc,
        nn as nn,
        noise as noise,
        sampling as sampling,
        sde as sde,
        storage as storage,
        training as training,
        vi as vi,
    )
    from genkit._core._checks import NonFiniteError as NonFiniteError
    from genkit.diffusion import Schedule as Schedule
    from genkit.divergence import FDivergence as FDivergence
    from genkit.inference import Measure as Measure, Posterior as Posterior, Problem as Problem, infer as infer
    from genkit.io import DefinitionError as DefinitionError, load as load, save as save
    from genkit.sampling import (
        AbstractSampler as AbstractSampler,
        Denoiser as Denoiser,
        Draws as Draws,
        Guidance as Guidance,
        Sampler as Sampler,
        Table as Table,
        sample as sample,
    )
    from genkit.storage import CorruptFileError as CorruptFileError, SaveError as SaveError
    from genkit.training import (
        Fitted as Fitted,
        Interrupted as Interrupted,
        Objective as Objective,
        Phase as Phase,
        Recipe as Recipe,
        fit as fit,
    )

    __version__: str


# Every name is imported when it is first used: `import genkit` itself costs a few milliseconds.
_SUBMODULES = (
    "bridge",
    "cli",
    "data",
    "diffusion",
    "distill",
    "distributions",
    "divergence",
    "guidance",
    "inference",
    "io",
    "mcmc",
    "nn",
    "noise",
    "sampling",
    "sde",
    "storage",
    "training",
    "vi",
)
_HOMES = {
    "AbstractSampler": "genkit.sampling",
    "CorruptFileError": "genkit.storage",
    "DefinitionError": "genkit.io",
    "Denoiser": "genkit.sampling",
    "Draws": "genkit.sampling",
    "FDivergence": "genkit.divergence",
    "Fitted": "genkit.training",
    "Guidance": "genkit.sampling",
    "Interrupted": "genkit.training",
    "Measure": "genkit.inference",
    "NonFiniteError": "genkit._core._checks",
    "Objective": "genkit.training",
    "Phase": "genkit.training",
    "Posterior": "genkit.inference",
    "Problem": "genkit.inference",
    "Recipe": "genkit.training",
    "SaveError": "genkit.storage",
    "Sampler": "genkit.sampling",
    "Schedule": "genkit.diffusion",
    "Table": "genkit.sampling",
    "fit": "genkit.training",
    "infer": "genkit.inference",
    "load": "genkit.io",
    "sample": "genkit.sampling",
    "save": "genkit.io",
    "__version__": "genkit._core._version",
}

__getattr__, __dir__ = _attach(__name__, _HOMES, _SUBMODULES)
