"""A generator of the ring of eight Gaussians in one step, without any critic.

What: a perceptron distilled from the analytic denoiser of the ring by the Jensen-Shannon divergence; the ratio is that
of the teacher to the smoothed empirical distribution of fresh draws, so that nothing but the student is trained.
Source: Xu, Nie & Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025.
Cost: ten seconds on two cores.
Expect: all eight modes, total variation of their masses below 0.08.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax

import genkit as gk


NUM_STEPS = 1_500

angle = 2 * jnp.pi * jnp.arange(8) / 8
teacher = gk.diffusion.MixtureDenoiser(jnp.ones(8), 4 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1), 0.16)


class Student(eqx.Module):
    """A perceptron from a standard normal to the plane."""

    mlp: eqx.nn.MLP

    def __init__(self, *, key):
        self.mlp = eqx.nn.MLP(2, 2, 64, 2, jax.nn.silu, key=key)

    def __call__(self, z, cond=None):
        """One draw from its latent."""
        return self.mlp(z)


recipe = gk.distill.recipe(
    teacher,
    Student(key=jax.random.key(0)),
    divergence=gk.divergence.JensenShannon(),
    ratio=gk.distill.EmpiricalRatio(768),
    noise_distribution=dist.LogUniform(0.3, 5.0),
    weight=jnp.square,
    num_steps=NUM_STEPS,
    optimizer=optax.adam(optax.cosine_decay_schedule(2e-3, NUM_STEPS)),
    ema=0.995,
    name="mixture student",
)
