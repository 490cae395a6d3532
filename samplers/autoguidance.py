"""Autoguidance of digits by a weak model that needs no training.

What: exaggerates what the sampled model does better than one Gaussian per digit, fitted here to the training digits; a
trained weak model (`models/digits_weak.py`) takes its place by `gk.load("runs/digits_weak").ema`.
Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024, equation 4.
Cost: 35 evaluations, and 14 of the Gaussians, which cost next to nothing.
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
    guidance=gk.guidance.interval(gk.guidance.autoguide(weak, 1.5), 0.05, 5.0),
)
