"""Handwritten digits in one step by f-distill: the student of `digits_pairs.py`, sharpened.

What: a one-step generator, started by regression on its guided teacher's draws, is trained by the Jensen-Shannon
divergence under noise; a fake denoiser and a discriminator follow it. The discriminator learns from the same draws and
sees the teacher's estimate; the regression stays as a term, so that no mode is lost.
Source: Xu, Nie & Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025; Yin et al.,
"One-step Diffusion with Distribution Matching Distillation", CVPR 2024 (the regression); Yin et al., "Improved
Distribution Matching Distillation for Fast Image Synthesis", NeurIPS 2024 (two time scales).
Cost: a minute on one core, with `--with start=RUN`, a run of `digits_pairs.py`.
Expect: digits in one evaluation, their labels right; see `pytest tests/distill/test_digits.py -m long -s`.
"""

import jax.numpy as jnp
import numpyro.distributions as dist
import optax

import genkit as gk


NUM_STEPS, BATCH = 400, 128
NOISE = dist.LogUniform(0.06, 4.0)
DIVERGENCE = gk.divergence.JensenShannon()

needs = {"start": "models/digits_pairs.py"}


def build(key, start):
    """The distillation before training: the fake denoiser starts as the teacher."""
    if getattr(getattr(start, "positives", None), "latents", None) is None:
        raise TypeError(f"`start` must be a run of models/digits_pairs.py; got a {type(start).__name__} without pairs.")
    features = start.teacher
    net = gk.distill.Discriminator((1, 8, 8), width=128, num_labels=10, sigma_data=0.7, features=features, key=key)
    return gk.distill.Distillation(
        start.student,
        start.teacher,
        fake=start.teacher,
        discriminator=net,
        guidance=start.guidance,
        positives=start.positives,
    )


def same(sigma):
    """The weight of the noise level."""
    return sigma


def phases(divergence=DIVERGENCE, num_steps=NUM_STEPS):
    """One cycle of training: critics three times, student once."""
    match = gk.distill.FDistill(divergence, gk.distill.DiscriminatorRatio(None), max_log_ratio=5.0)
    return gk.distill.cycle(
        match + 0.3 * gk.distill.PairRegression(),
        noise_distribution=NOISE,
        latent_shape=(1, 8, 8),
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-5, num_steps)),
        fake_optimizer=optax.adam(5e-4),
        weight=same,
        batch_size=BATCH,
        fake_steps=3,
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
