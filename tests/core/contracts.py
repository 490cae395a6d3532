"""Contract cases of the ground floor."""

import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from contract import Case

from genkit._core import as_measure


CASES = [
    Case("DistributionMeasure", lambda: as_measure(dist.Normal(jnp.zeros(2), 1.0)), lambda m: m.sample(key=jr.key(0))),
]
