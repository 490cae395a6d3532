"""The fairness of a coin: Beta prior, ten flips, a posterior known in closed form.

What: `fairness ~ Beta(10, 10)`, six heads and four tails.
Source: the first example of Pyro's SVI tutorial.
Expected: posterior Beta(16, 14): mean 0.5333, sd 0.0896; log evidence of the sequence -7.0694.
Cost: seconds.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import genkit as gk


flips = jnp.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0])


def model(data):
    """The fairness and the flips."""
    fairness = numpyro.sample("fairness", dist.Beta(10.0, 10.0))
    with numpyro.plate("flip", len(data)):
        numpyro.sample("heads", dist.Bernoulli(fairness), obs=data)


problem = gk.Problem(model, args=(flips,), name="coin")
