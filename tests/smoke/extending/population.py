"""A population of one's own: after every step the worse half of the particles is replaced by the better."""

import equinox as eqx
import jax.numpy as jnp

import genkit as gk


class BetterHalf(gk.sampling.Population):
    """Judges particles by the first coordinate of their prediction."""

    num_particles: int = eqx.field(static=True)

    def init(self, x):
        return jnp.zeros(())

    def update(self, event, carry, ctx):
        order = jnp.argsort(-event.x0[:, 0])
        better = order[: self.num_particles // 2]
        return jnp.concatenate([better, better]), carry + 1

    def report(self, carry):
        return {"selections": carry}


table = gk.diffusion.ancestral(gk.diffusion.karras(16, 0.02, 20.0))
sampler = gk.Sampler(table, guidance=BetterHalf(4))
