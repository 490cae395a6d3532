"""Sampling: denoisers, tables, guidance, and the loop behind `gk.sample`."""

from genkit.sampling._checks import check_levels as check_levels, check_net_labels as check_net_labels
from genkit.sampling._context import Context as Context, Prediction as Prediction, Slot as Slot
from genkit.sampling._denoiser import (
    AbstractDelegatingDenoiser as AbstractDelegatingDenoiser,
    Denoiser as Denoiser,
    as_denoiser as as_denoiser,
    null_like as null_like,
)
from genkit.sampling._draws import Draws as Draws
from genkit.sampling._guidance import (
    Guidance as Guidance,
    PredictionTransform as PredictionTransform,
    Transformed as Transformed,
)
from genkit.sampling._guided import Guided as Guided
from genkit.sampling._hooks import (
    Hooks as Hooks,
    Population as Population,
    StepEvent as StepEvent,
    Stepping as Stepping,
    StepTransform as StepTransform,
)
from genkit.sampling._part import AbstractPart as AbstractPart
from genkit.sampling._sample import sample as sample
from genkit.sampling._sampler import (
    AbstractSampler as AbstractSampler,
    Sampler as Sampler,
    as_sampler as as_sampler,
    start as start,
)
from genkit.sampling._table import HISTORY as HISTORY, Row as Row, Table as Table
