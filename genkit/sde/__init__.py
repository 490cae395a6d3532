"""Neural stochastic differential equations with fractional noise: simulation, variational inference, exact answers."""

from genkit.sde._diffrax import as_terms as as_terms
from genkit.sde._elbo import elbo as elbo, iwelbo as iwelbo, log_weights as log_weights
from genkit.sde._forecast import Forecast as Forecast, forecast as forecast
from genkit.sde._gaussian_process import gp_log_evidence as gp_log_evidence
from genkit.sde._guide import AbstractGuide as AbstractGuide, LinearGuide as LinearGuide
from genkit.sde._kalman import kalman as kalman
from genkit.sde._latent import LatentSDE as LatentSDE, NegativeELBO as NegativeELBO
from genkit.sde._model import (
    Constant as Constant,
    FractionalSDE as FractionalSDE,
    LearnedHurst as LearnedHurst,
    OrnsteinUhlenbeck as OrnsteinUhlenbeck,
)
from genkit.sde._neural import NeuralGuide as NeuralGuide
from genkit.sde._observed import GaussianNoise as GaussianNoise, Observed as Observed
from genkit.sde._sampler import PathSampler as PathSampler
from genkit.sde._simulate import Paths as Paths, simulate as simulate
