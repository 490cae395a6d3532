"""Handwritten digits in one step by regression: the noise of the teacher's draws to the draws themselves.

What: the student starts as the teacher of `digits.py`, run once at noise level 2.5, and learns where the teacher's
probability flow ends from each noise. It covers what the teacher covers, a little blurred; `digits_onestep.py` goes on.
Source: Luhman & Luhman, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed", 2021.
Cost: forty seconds on one core, a third of it for the pairs, with `--with teacher=RUN`, a run of `digits.py`.
Expect: recall near the teacher's; see `pytest tests/distill/test_digits.py -m long -s`.
"""

import jax.numpy as jnp
import numpyro.distributions as dist
import optax

import genkit as gk


NUM_STEPS, BATCH, PAIRS = 3_000, 128, 20_000
GUIDANCE = gk.guidance.cfg(1.5)
HEUN = gk.diffusion.heun(gk.diffusion.karras(18, 0.002, 80.0))

needs = {"teacher": "models/digits.py"}


def build(key, teacher, guidance=GUIDANCE):
    """The student before training, and a pool of the teacher's guided draws with the noise each came from."""
    labels = jnp.arange(PAIRS) % 10
    pool = gk.distill.teacher_pool(teacher, HEUN, PAIRS, cond=labels, guidance=guidance, key=key, batch_size=500)
    return gk.distill.Distillation(gk.distill.OneStep(teacher, 2.5), teacher, guidance=guidance, positives=pool)


recipe = gk.Recipe(
    build=build,
    data=gk.distill.Conditions(jnp.arange(10), BATCH),
    phases=gk.distill.cycle(
        gk.distill.PairRegression(),
        noise_distribution=dist.Delta(0.0),  # regression compares clean draws alone
        latent_shape=(1, 8, 8),
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, NUM_STEPS)),
        batch_size=BATCH,
    ),
    num_steps=NUM_STEPS,
    ema=0.995,
    name="digits by pairs",
)
