"""Markov chain Monte Carlo on numpyro models, as methods for `gk.infer`."""

from genkit.mcmc._hmc import HMC as HMC, NUTS as NUTS
