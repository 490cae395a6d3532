"""Schrödinger bridge from handwritten threes to eights, in sixteen principal components.

What: a light bridge of 3 full-covariance components at epsilon = 0.1 (pixels in [-1, 1]), fitted to 143 threes and 135
eights that are blurred by noise of standard deviation 0.3; K and noise were chosen by folds of these digits. States
decode to pictures by `decode`, which the file exposes for scripts.
Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024; data: gk.data.digits().
Cost: about ten seconds on two cores.
Expect: a held-out objective at least a nat below that of a single full Gaussian.
"""

import numpy as np

import genkit as gk


NUM_COMPONENTS = 16
EPSILON = 0.1

digits = gk.data.digits()
pixels = np.asarray(digits.x_train).reshape(-1, 64)
labels = np.asarray(digits.y_train)
both = pixels[(labels == 3) | (labels == 8)]
mean = both.mean(0)
axes = np.linalg.svd(both - mean, full_matrices=False)[2][:NUM_COMPONENTS]


def encode(x):
    """Pictures (n, 1, 8, 8) to principal components (n, 16)."""
    return (np.asarray(x).reshape(-1, 64) - mean) @ axes.T


def decode(z):
    """Principal components (n, 16) to pictures (n, 1, 8, 8)."""
    return (np.asarray(z) @ axes + mean).reshape(-1, 1, 8, 8)


recipe = gk.bridge.recipe(
    encode(pixels[labels == 3]),
    encode(pixels[labels == 8]),
    EPSILON,
    3,
    scale="full",
    num_steps=500,
    batch_size=256,
    noise=0.3,
    name="bridge_digits",
)
