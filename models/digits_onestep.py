"""Handwritten digits in one step: the diffusion teacher of `digits.py`, guided, distilled by f-distill.

What: a one-step generator started from the teacher and trained by the Jensen-Shannon divergence under noise; a fake
denoiser and a discriminator follow it, two updates each per update of the student. The discriminator learns from draws
of the same guided teacher.
Source: Xu, Nie & Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025; Yin et al.,
"Improved Distribution Matching Distillation for Fast Image Synthesis", NeurIPS 2024.
Cost: minutes on two cores, with `--with teacher=RUN`, a run of `digits.py`.
Expect: digits in one evaluation, their labels right; less varied than the teacher's, so judge their recall too.
"""

import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
import optax

import genkit as gk


NUM_STEPS, BATCH, POOL = 1_500, 128, 2_000
NOISE = dist.LogUniform(0.06, 4.0)
GUIDANCE = gk.guidance.cfg(1.5)
DIVERGENCE = gk.divergence.JensenShannon()
HEUN = gk.diffusion.heun(gk.diffusion.karras(18, 0.002, 80.0))

needs = {"teacher": "models/digits.py"}


def build(key, teacher, guidance=GUIDANCE):
    """The distillation before training: student and fake start as the teacher; a pool of its guided draws."""
    key_net, key_pool = jr.split(key)
    labels = jnp.arange(POOL) % 10
    draws = gk.sample(HEUN, teacher, POOL, cond=labels, guidance=guidance, key=key_pool, batch_size=500)
    net = gk.distill.Discriminator((1, 8, 8), width=128, num_labels=10, sigma_data=0.7, key=key_net)
    return gk.distill.Distillation(
        gk.distill.OneStep(teacher, 2.5),
        teacher,
        fake=teacher,
        discriminator=net,
        guidance=guidance,
        positives=gk.distill.Positives(draws.value, labels),
    )


def square(sigma):
    """The weight of the noise level: steps of equal size in data space."""
    return sigma**2


def phases(divergence=DIVERGENCE, num_steps=NUM_STEPS):
    """One cycle of training: critics twice, student once."""
    return gk.distill.cycle(
        gk.distill.FDistill(divergence, gk.distill.DiscriminatorRatio(None), max_log_ratio=5.0),
        noise_law=NOISE,
        latent_shape=(1, 8, 8),
        optimizer=optax.adam(optax.cosine_decay_schedule(2e-4, num_steps)),
        fake_optimizer=optax.adam(5e-4),
        weight=square,
        batch_size=BATCH,
        fake_steps=2,
        critics=(True, True),
    )


recipe = gk.Recipe(
    build=build,
    data=gk.distill.Conditions(jnp.arange(10), BATCH),
    phases=phases(),
    num_steps=NUM_STEPS,
    ema=0.995,
    name="digits in one step",
)
