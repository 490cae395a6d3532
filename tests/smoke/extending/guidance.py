"""A guidance of one's own: classifier-free guidance whose scale falls with the noise level."""

import jax
import jax.numpy as jnp

import genkit as gk


class FadingGuidance(gk.Guidance):
    """Scale 1 + strength at high noise, 1 at none; the first slot is the plain prediction."""

    strength: jax.Array

    def slots(self):
        return gk.sampling.Slot("conditional"), gk.sampling.Slot("unconditional", cond="null")

    def init(self, x):
        return None

    def needs(self, carry, ctx):
        return {"conditional": True, "unconditional": True}

    def combine(self, preds, ctx, carry):
        scale = 1 + self.strength * ctx.sigma / (1 + ctx.sigma)
        weak = preds["unconditional"].x0
        return weak + scale * (preds["conditional"].x0 - weak), carry, {"scale": scale}


table = gk.diffusion.heun(gk.diffusion.karras(16, 0.02, 20.0))
sampler = gk.Sampler(table, guidance=FadingGuidance(jnp.array(1.0)))
