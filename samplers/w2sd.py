"""Weak-to-strong reflection of digits against a weak model that needs no training.

What: before each step at high noise one step of the sampled model down and one step of the weak model, one Gaussian per
digit, back up; a trained weak model (`models/digits_weak.py`) takes its place by `gk.load("runs/digits_weak").ema`.
Source: Bai et al., "Weak-to-Strong Diffusion with Reflection", 2025, algorithm 1.
Cost: 35 evaluations, and two (one of the Gaussians) for each step that starts above noise level 1.
Expect: labels of digits right more often than without guidance.
"""

import jax.numpy as jnp
import numpy as np

import genkit as gk


digits = gk.data.digits()
groups = [digits.x_train[digits.y_train == k] for k in range(10)]
means = np.stack([group.mean(axis=0) for group in groups])
# A pixel that is blank in all examples keeps a little variance.
variances = np.stack([group.var(axis=0) for group in groups]) + 0.01
weak = gk.diffusion.MixtureDenoiser(jnp.ones(10), means, variances, labels=np.arange(10))
sampler = gk.Sampler(
    gk.diffusion.heun(gk.diffusion.karras(18, 0.002, 80.0)),
    # Reflection acts best near the noise end: steps that start lower are left alone.
    guidance=gk.guidance.reflect(weak, sigma_lo=1.0),
)
