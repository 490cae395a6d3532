"""Long memory in the annual flow of the Nile, with a fifth of the years missing.

What: flow = mean + scale * (fractional Gaussian noise of one year). Summed up, the standardized flow is a fractional
Brownian motion seen year by year, so `gk.sde.kalman` gives the density; the missing years are unknowns of the program.
Source: data of Cobb, Biometrika 1978. The exact maximum-likelihood fit of all hundred years has H = 0.805 (0.060).
Cost: seven minutes of one core with samplers/nuts_hurst.py.
Expect: a posterior of H of 0.85 (0.06).
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import genkit as gk


lift = gk.noise.ma_fbm()
years, flow = gk.data.nile()
missing = np.arange(2, 100, 5)  # every fifth year is withheld


def model(flow, missing):
    """Priors, the withheld years, and the density of the whole series."""
    hurst = numpyro.sample("hurst", dist.Uniform(0.05, 0.97))
    # In units of its prior, so that all unknowns are of order one for the sampler's first steps.
    mean = numpyro.deterministic("mean", 900.0 + 200.0 * numpyro.sample("level", dist.Normal(0.0, 1.0)))
    scale = numpyro.sample("scale", dist.LogNormal(5.0, 0.5))
    unseen = numpyro.sample("unseen", dist.ImproperUniform(dist.constraints.real, (), (missing.size,)))
    num = flow.shape[0]
    standard = ((jnp.asarray(flow) - mean) / scale).at[missing].set(unseen)
    sde = gk.sde.FractionalSDE(lambda t, x: 0.0 * x, gk.sde.Constant(1.0), lift, hurst, float(num))
    # An error of 2 % of a year's noise keeps the filter's arithmetic away from exact interpolation.
    path = gk.sde.Observed(np.arange(1.0, num + 1), jnp.cumsum(standard), gk.sde.GaussianNoise(0.02))
    numpyro.factor("flow", gk.sde.kalman(sde, path) - (num - missing.size) * jnp.log(scale))
    numpyro.deterministic("withheld", mean + scale * unseen)


problem = gk.Problem(model, args=(flow, missing))
