"""The ground floor: what every wing stands on."""

from ._checks import NonFiniteError as NonFiniteError
from ._denoiser import Denoiser as Denoiser, null_like as null_like
from ._measure import (
    DistributionMeasure as DistributionMeasure,
    Measure as Measure,
    as_measure as as_measure,
)
