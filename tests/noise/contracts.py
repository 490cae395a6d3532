"""Contract cases of driving noise."""

import jax.numpy as jnp
from contract import Case

import genkit as gk


def numbers(lift):
    return lift.weights(jnp.asarray(0.7)), lift.covariance(jnp.asarray(0.7), jnp.array([0.2, 0.9]), jnp.asarray(0.5))


CASES = [
    # A lift holds no array: nothing in it is learned or vectorized.
    Case("Lift", lambda: gk.noise.ma_fbm(3, 0.1, 100.0), numbers, grad=False, vmap=False, rtol=1e-4),
    Case("Lift, Brownian", gk.noise.brownian, numbers, grad=False, vmap=False),
]
