"""Coal-mining disasters with one change of rate: the year of the change is discrete, and summed out.

What: `tau ~ U{1, ..., 110}`, rates `early, late ~ Gamma(2, 1)`, disasters in year `t` `~ Poisson(early)` for `t < tau`
and `~ Poisson(late)` from then on; years 1851 to 1961 are 0 to 110.
Source: series of Jarrett, "A note on the intervals between coal-mining disasters", Biometrika 66 (1979), in the yearly
form that PyMC made known; its two missing entries are set to 2 and 1.
Values: log evidence -175.801962, most probable change 41 with probability .2333, mean 39.868.
Cost: of a density, 110 times that of a known change.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import genkit as gk


TEXT = """
4 5 4 0 1 4 3 4 0 6 3 3 4 0 2 6 3 3 5 4 5 3 1 4 4 1 5 5 3 4 2 5 2 2 3 4 2 1 3 2 2 1 1 1 1 3 0 0 1 0 1 1 0 0 3 1 0 3
2 2 0 1 1 1 0 1 0 1 0 0 0 2 1 0 0 0 1 1 0 2 3 3 1 1 2 1 1 1 1 2 4 2 0 0 1 4 0 0 0 1 0 0 0 0 0 1 0 0 1 0 1
"""
disasters = jnp.array([int(word) for word in TEXT.split()])


def model(y):
    """A Poisson rate that changes once."""
    years = jnp.arange(y.shape[0])
    tau = numpyro.sample("tau", dist.DiscreteUniform(1, y.shape[0] - 1))
    early = numpyro.sample("early", dist.Gamma(2.0, 1.0))
    late = numpyro.sample("late", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Poisson(jnp.where(years < tau, early, late)), obs=y)


problem = gk.Problem(model, args=(disasters,), name="coal change point")
