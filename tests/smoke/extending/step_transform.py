"""A step transform of one's own: after each step at high noise, go back up and down once more."""

import equinox as eqx
import jax
import jax.numpy as jnp

import genkit as gk


class Again(gk.sampling.StepTransform):
    """One first-order step from the state's level up to the step's start, and down again."""

    above: jax.Array
    at: str = eqx.field(static=True, default="end")

    def init(self, x):
        return None

    def active(self, ctx):
        return ctx.sigma_next > self.above

    def __call__(self, x, carry, ctx, step):
        higher = step(x, ctx.sigma, 2 * ctx.sigma)
        return step(higher, 2 * ctx.sigma, ctx.sigma), carry


table = gk.diffusion.ddim(gk.diffusion.karras(16, 0.02, 20.0))
sampler = gk.Sampler(table, guidance=Again(jnp.array(1.0)))
