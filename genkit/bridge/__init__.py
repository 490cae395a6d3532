"""Schrödinger bridges; epsilon is the variance of the reference at t = 1, everywhere."""

from genkit.bridge._abstract import AbstractBridge as AbstractBridge, AbstractExactBridge as AbstractExactBridge
from genkit.bridge._batches import UnpairedBatches as UnpairedBatches
from genkit.bridge._bridge import Bridge as Bridge
from genkit.bridge._distribution import BridgeDistribution as BridgeDistribution
from genkit.bridge._fit_light import fit_light as fit_light
from genkit.bridge._fit_matching import fit_matching as fit_matching
from genkit.bridge._gaussian import gaussian as gaussian
from genkit.bridge._light import light as light
from genkit.bridge._metrics import bw2_uvp as bw2_uvp, cbw2_uvp as cbw2_uvp, path_kl as path_kl, plan_kl as plan_kl
from genkit.bridge._mixture_pair import MixturePair as MixturePair, mixture_pair as mixture_pair
from genkit.bridge._monge_gap import monge_gap as monge_gap
from genkit.bridge._neural import NeuralBridge as NeuralBridge, sf2m as sf2m
from genkit.bridge._objectives import LightObjective as LightObjective, MatchingObjective as MatchingObjective
from genkit.bridge._potential import MixturePotential as MixturePotential
from genkit.bridge._recipe import recipe as recipe
from genkit.bridge._reference import AbstractReference as AbstractReference, Brownian as Brownian
from genkit.bridge._report import FitReport as FitReport, FittedBridge as FittedBridge
from genkit.bridge._samplers import EulerPaths as EulerPaths, ExactPaths as ExactPaths
from genkit.bridge._scales import (
    AbstractScale as AbstractScale,
    Diag as Diag,
    Full as Full,
    Iso as Iso,
    LowRank as LowRank,
)
from genkit.bridge._sinkhorn import DiscretePlan as DiscretePlan, sinkhorn as sinkhorn
