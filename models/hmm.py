"""A hidden Markov model with unknown transitions: calm and busy spells of a series, the states summed out.

What: staying probabilities `stay ~ Beta(9, 2)` of two states, levels `low ~ N(-1, 1)`, `low + gap` with
`gap ~ Gamma(2, 1)`, spread `s ~ HalfNormal(1)`; `z_t` follows the chain in numpyro's `scan`, `y_t ~ N(level[z_t], s)`.
Source: written for genkit; 60 values drawn from stay (.9, .8), levels -1 and 1.5, spread .6, rounded to .1.
Cost: grows with steps times states squared.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import genkit as gk


TEXT = """
-1.0 -1.6 -1.9 -0.4 -2.1 -1.7 -1.0 -1.8 2.6 -1.1 -1.2 -2.3 -0.5 -0.6 2.2 -1.1 -0.7 -1.7 -1.9 -0.3 -2.2 -1.0 -0.7
-1.3 0.1 -1.2 -1.3 2.1 0.6 1.2 -2.5 -1.4 -1.8 -0.7 -1.1 -0.6 -1.4 -1.6 -0.0 -2.0 -0.3 -1.3 -1.2 0.1 -2.2 -1.8 -2.1
-0.2 2.2 1.9 1.8 1.1 1.7 2.5 -0.7 -0.8 -2.2 -1.6 -0.2 -0.9
"""
series = jnp.array([float(word) for word in TEXT.split()])


def model(y):
    """Two states, each with a level."""
    stay = numpyro.sample("stay", dist.Beta(9.0, 2.0).expand([2]).to_event(1))
    low = numpyro.sample("low", dist.Normal(-1.0, 1.0))
    gap = numpyro.sample("gap", dist.Gamma(2.0, 1.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    levels = jnp.stack([low, low + gap])
    transitions = jnp.array([[stay[0], 1.0 - stay[0]], [1.0 - stay[1], stay[1]]])

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(transitions[z]))
        numpyro.sample("y", dist.Normal(levels[z], s), obs=y)
        return z, None

    scan(step, 0, y)


problem = gk.Problem(model, args=(series,), name="hidden Markov model")
