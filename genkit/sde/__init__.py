"""Neural stochastic differential equations with fractional noise: simulation, variational inference, exact answers."""

from ._elbo import elbo as elbo, log_weights as log_weights
from ._guide import AbstractGuide as AbstractGuide, LinearGuide as LinearGuide
from ._kalman import gp_log_evidence as gp_log_evidence, kalman as kalman
from ._latent import LatentSDE as LatentSDE, NegativeELBO as NegativeELBO
from ._model import (
    Constant as Constant,
    FractionalSDE as FractionalSDE,
    LearnedHurst as LearnedHurst,
    OrnsteinUhlenbeck as OrnsteinUhlenbeck,
)
from ._neural import NeuralGuide as NeuralGuide
from ._observed import GaussianNoise as GaussianNoise, Observed as Observed
from ._simulate import Paths as Paths, simulate as simulate
