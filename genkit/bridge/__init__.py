"""Schrödinger bridges; epsilon is the variance of the reference at t = 1, everywhere."""

from ._bridge import AbstractBridge as AbstractBridge, Bridge as Bridge
from ._closed_form import (
    MixturePair as MixturePair,
    gaussian as gaussian,
    light as light,
    mixture_pair as mixture_pair,
    riccati as riccati,
)
from ._distribution import BridgeDistribution as BridgeDistribution
from ._fit_light import FitReport as FitReport, fit_light as fit_light
from ._make_scale import eigen_from_dense as eigen_from_dense, make_scale as make_scale
from ._matching import NeuralBridge as NeuralBridge, fit_matching as fit_matching, sf2m as sf2m
from ._matrix_scale import Eigen as Eigen, LowRank as LowRank
from ._metrics import bw2_uvp as bw2_uvp, cbw2_uvp as cbw2_uvp, path_kl as path_kl, plan_kl as plan_kl
from ._objectives import (
    LightObjective as LightObjective,
    MatchingObjective as MatchingObjective,
    UnpairedBatches as UnpairedBatches,
)
from ._potential import MixturePotential as MixturePotential
from ._recipe import recipe as recipe
from ._reference import AbstractReference as AbstractReference, Brownian as Brownian
from ._samplers import EulerPaths as EulerPaths, ExactPaths as ExactPaths
from ._scale import (
    AbstractScale as AbstractScale,
    Diag as Diag,
    Iso as Iso,
    Zero as Zero,
)
from ._sinkhorn import DiscretePlan as DiscretePlan, monge_gap as monge_gap, sinkhorn as sinkhorn
