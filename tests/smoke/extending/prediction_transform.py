"""A prediction transform of one's own: soft bounds on the guided prediction."""

import equinox as eqx
import jax
import jax.numpy as jnp

import genkit as gk


class SoftBounds(gk.sampling.PredictionTransform):
    """Squeezes every coordinate into (-limit, limit)."""

    limit: jax.Array
    needs_plain: bool = eqx.field(static=True, default=False)

    def __call__(self, x0, plain, ctx):
        return self.limit * jnp.tanh(x0 / self.limit)


table = gk.diffusion.heun(gk.diffusion.karras(16, 0.02, 20.0))
sampler = gk.Sampler(table, guidance=gk.guidance.cfg(2.0) >> SoftBounds(jnp.array(6.0)))
