"""f-divergences: the abstraction, the tabulated ones, those with a parameter and those that users give."""

from genkit.divergence._f_divergences._base import FDivergence as FDivergence
from genkit.divergence._f_divergences._closed_form import (
    ForwardKL as ForwardKL,
    Jeffreys as Jeffreys,
    JensenShannon as JensenShannon,
    LeCam as LeCam,
    NeymanChi2 as NeymanChi2,
    PearsonChi2 as PearsonChi2,
    ReverseKL as ReverseKL,
    SoftenedForwardKL as SoftenedForwardKL,
    SoftenedReverseKL as SoftenedReverseKL,
    SquaredHellinger as SquaredHellinger,
)
from genkit.divergence._f_divergences._from_functions import from_f as from_f, from_weight as from_weight
from genkit.divergence._f_divergences._parametric import Alpha as Alpha, TotalVariation as TotalVariation
