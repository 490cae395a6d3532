"""Covariance families of mixture potentials."""

from genkit.bridge._scales._base import (
    AbstractLogScale as AbstractLogScale,
    AbstractScale as AbstractScale,
    Time as Time,
    take as take,
)
from genkit.bridge._scales._diagonal import Diag as Diag, Iso as Iso
from genkit.bridge._scales._full import Full as Full, full_from_dense as full_from_dense
from genkit.bridge._scales._low_rank import LowRank as LowRank
from genkit.bridge._scales._make import make_scale as make_scale
from genkit.bridge._scales._points import Points as Points
