"""Draws from a scalar distribution that together cover it."""

import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key


def draw_evenly(distribution: dist.Distribution, num_samples: int, *, key: Key[Array, ""]) -> Float[Array, " n"]:
    """Draw from a scalar distribution so that the draws together cover it: shifted even quantiles in random order.

    Args:
        distribution: scalar numpyro distribution; without an inverse distribution function the draws are independent.
        num_samples: number of draws.
        key: typed PRNG key.

    Returns:
        The draws; each by itself follows the distribution.

    Source: Kingma et al., "Variational Diffusion Models", NeurIPS 2021, appendix I.1.
    """
    key_shift, key_order, key_draw = jr.split(key, 3)
    quantile = (jr.uniform(key_shift) + jnp.arange(num_samples) / num_samples) % 1
    # Neither end is a draw: half of one float32 step from 0 and from 1 keeps the inverse finite.
    quantile = jnp.clip(quantile, 2.0**-25, 1 - 2.0**-24)
    try:
        return distribution.icdf(jr.permutation(key_order, quantile))
    # numpyro has some inverses only where another package is installed.
    except (NotImplementedError, ImportError):
        return distribution.sample(key_draw, (num_samples,))
