"""Distances between samples, and how good samples are."""

from ._f_base import FDivergence as FDivergence
from ._f_family import Alpha as Alpha, TotalVariation as TotalVariation
from ._f_table import (
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
from ._f_user import from_f as from_f, from_weight as from_weight
from ._kernels import cauchy_schwarz as cauchy_schwarz, energy_distance as energy_distance, mmd as mmd
from ._quality import nearest_distance_ratio as nearest_distance_ratio, precision_recall as precision_recall
from ._ratios import diagnose as diagnose, rank_bins as rank_bins, self_normalize as self_normalize
from ._sinkhorn import (
    AbstractCost as AbstractCost,
    MatrixCost as MatrixCost,
    PointCost as PointCost,
    SinkhornState as SinkhornState,
    sinkhorn_divergence as sinkhorn_divergence,
    sinkhorn_potentials as sinkhorn_potentials,
    transport_value as transport_value,
)
from ._sliced import sliced_wasserstein as sliced_wasserstein
