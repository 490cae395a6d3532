"""Neural stochastic differential equations with fractional noise: simulation, variational inference, exact answers."""

from ._diffrax import as_terms as as_terms
from ._elbo import elbo as elbo, iwelbo as iwelbo, log_weights as log_weights
from ._forecast import Forecast as Forecast, forecast as forecast
from ._gaussian_process import gp_log_evidence as gp_log_evidence
from ._guide import AbstractGuide as AbstractGuide, LinearGuide as LinearGuide
from ._kalman import kalman as kalman
from ._latent import LatentSDE as LatentSDE, NegativeELBO as NegativeELBO
from ._model import (
    Constant as Constant,
    FractionalSDE as FractionalSDE,
    LearnedHurst as LearnedHurst,
    OrnsteinUhlenbeck as OrnsteinUhlenbeck,
)
from ._neural import NeuralGuide as NeuralGuide
from ._observed import GaussianNoise as GaussianNoise, Observed as Observed
from ._sampler import PathSampler as PathSampler
from ._simulate import Paths as Paths, simulate as simulate
