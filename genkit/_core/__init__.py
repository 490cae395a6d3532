"""The ground floor: what every wing stands on."""

from ._checks import NonFiniteError as NonFiniteError
from ._denoiser import Denoiser as Denoiser, null_like as null_like
from ._draws import Draws as Draws
from ._files import CorruptFileError as CorruptFileError, SaveError as SaveError
from ._fit import fit as fit
from ._fit_loop import Fitted as Fitted, Interrupted as Interrupted
from ._guidance import (
    Context as Context,
    Guidance as Guidance,
    Hooks as Hooks,
    Population as Population,
    Prediction as Prediction,
    Slot as Slot,
    StepEvent as StepEvent,
    StepTransform as StepTransform,
)
from ._guidance_algebra import AbstractPost as AbstractPost
from ._guided import Guided as Guided
from ._host import AbstractHost as AbstractHost
from ._infer import Posterior as Posterior, infer as infer
from ._measure import (
    DistributionMeasure as DistributionMeasure,
    Measure as Measure,
    as_measure as as_measure,
)
from ._objective import (
    Objective as Objective,
    Phase as Phase,
    Problem as Problem,
    Recipe as Recipe,
    model_updates as model_updates,
)
from ._resampling import (
    conditional_resample as conditional_resample,
    effective_sample_size as effective_sample_size,
    systematic_resample as systematic_resample,
)
from ._sample import sample as sample
from ._sampler import AbstractSampler as AbstractSampler, Sampler as Sampler
from ._table import Row as Row, Table as Table
