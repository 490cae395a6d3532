"""Gradient-free classifier guidance of digits: away from the digit that a prediction is confused with.

What: a linear classifier (Gaussian classes of one shared covariance, fitted here to the 1,400 training digits in closed
form) looks at each prediction and names the rival digit; the more confused, the further away from it.
Source: "Gradient-Free Classifier Guidance for Diffusion Model Sampling", WACV 2026, reconstructed from its abstract.
Cost: 35 evaluations, and one more for each prediction that is confused by more than one part in twenty.
Expect: labels of digits right in more than 99 of 100 draws.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import genkit as gk


class Discriminant(eqx.Module):
    """Linear logits."""

    weights: jax.Array
    bias: jax.Array

    def __call__(self, x0):
        """Logits of one image."""
        return self.weights.astype(x0.dtype) @ x0.reshape(-1) + self.bias.astype(x0.dtype)


def discriminant(images, labels):
    """Linear discriminant analysis with a tenth of shrinkage."""
    x = np.asarray(images, np.float64).reshape(len(images), -1)
    means = np.stack([x[labels == k].mean(axis=0) for k in range(10)])
    cov = np.cov((x - means[labels]).T)
    # Pixels that are blank in all images make the covariance singular.
    cov = 0.9 * cov + 0.1 * np.trace(cov) / len(cov) * np.eye(len(cov))
    # The log-density of class k is x' S^-1 m_k - m_k' S^-1 m_k / 2, up to what all classes share.
    weights = np.linalg.solve(cov, means.T).T
    return Discriminant(jnp.asarray(weights), jnp.asarray(-0.5 * np.sum(weights * means, axis=1)))


digits = gk.data.digits()
classifier = discriminant(digits.x_train, digits.y_train)
sampler = gk.Sampler(
    gk.diffusion.heun(gk.diffusion.karras(18, 0.002, 80.0)),
    guidance=gk.guidance.interval(gk.guidance.gfcg(classifier, 4.0, skip_below=0.05), 0.0, 2.0),
    # Draws are confused one by one: those that are get batches of their own.
    skip="compact",
)
