"""Markov chain Monte Carlo on numpyro models, as methods for `gk.infer`."""

from ._hmc import HMC as HMC, NUTS as NUTS
