"""Distributions and special functions that numpyro lacks."""

from genkit.distributions._apgw import APGW as APGW
from genkit.distributions._bessel import (
    bessel_ratio as bessel_ratio,
    log_bessel_i as log_bessel_i,
    log_bessel_k as log_bessel_k,
)
from genkit.distributions._censored import Censored as Censored, censored as censored
from genkit.distributions._von_mises_fisher import VonMisesFisher as VonMisesFisher
