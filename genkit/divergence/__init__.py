"""Distances between samples, and how good samples are."""

from genkit.divergence._costs import AbstractCost as AbstractCost, MatrixCost as MatrixCost, PointCost as PointCost
from genkit.divergence._entropic_transport import (
    SinkhornState as SinkhornState,
    sinkhorn_potentials as sinkhorn_potentials,
)
from genkit.divergence._f_divergences import (
    Alpha as Alpha,
    FDivergence as FDivergence,
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
    TotalVariation as TotalVariation,
    from_f as from_f,
    from_weight as from_weight,
)
from genkit.divergence._kernels import cauchy_schwarz as cauchy_schwarz, energy_distance as energy_distance, mmd as mmd
from genkit.divergence._quality import (
    nearest_distance_ratio as nearest_distance_ratio,
    precision_recall as precision_recall,
)
from genkit.divergence._ratios import diagnose as diagnose, rank_bins as rank_bins, self_normalize as self_normalize
from genkit.divergence._sinkhorn_divergence import sinkhorn_divergence as sinkhorn_divergence
from genkit.divergence._sliced import sliced_wasserstein as sliced_wasserstein
from genkit.divergence._transport_value import (
    differentiable_potentials as differentiable_potentials,
    transport_value as transport_value,
    weighted_value as weighted_value,
)
