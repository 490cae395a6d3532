"""Contract cases of guidance, used as it is meant to be: inside a draw."""

import jax.numpy as jnp
import jax.random as jr
from contract import Case

import genkit as gk


def denoiser(x, sigma, cond=None):
    mean = 0.0 if cond is None else jnp.where(cond < 0, 0.0, 1.0 * cond)
    return mean + (x - mean) / (1 + sigma**2)


def draw(guidance):
    sampler = gk.diffusion.ddim(gk.diffusion.karras(4, 0.1, 2.0))
    return gk.sample(sampler, denoiser, 3, shape=(2,), cond=1, guidance=guidance, key=jr.key(0)).value


CASES = [
    Case("Linear", lambda: gk.guidance.cfg(2.0), draw),
    Case("Gate", lambda: gk.guidance.interval(gk.guidance.cfg(2.0), 0.2, 1.5), draw),
]
