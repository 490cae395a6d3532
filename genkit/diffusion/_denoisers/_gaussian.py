"""The exact denoiser of Gaussian data."""

import jax
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Inexact, Key, PyTree

from genkit._core._checks import check_count, check_finite, check_key
from genkit._core._fields import as_number
from genkit.diffusion._denoisers._covariance import Covariance, as_matrix, color, factor, log_normal, posterior_mean
from genkit.diffusion._denoisers._inputs import as_example, as_level
from genkit.diffusion._denoisers._labels import label_mask
from genkit.sampling import Denoiser


class GaussianDenoiser(Denoiser):
    r"""The exact denoiser of Gaussian data, $D(x, \sigma) = \mu + \Sigma(\Sigma + \sigma^2 I)^{-1}(x - \mu)$.

    A full covariance is diagonalized once, at construction: an evaluation is two products of a matrix and a vector. A
    variance or a diagonal needs none. Directions without variance stay at the mean.

    Args:
        mean: mean of the data, an array of the shape of one example (`d` entries).
        cov: covariance: one variance `()`, a diagonal of the shape of `mean`, or a matrix `(d, d)`; positive
            semi-definite.

    Raises:
        ValueError: for a covariance of another shape, not symmetric, or with a negative eigenvalue.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> denoiser(jnp.array([4.0, 4.0]), jnp.array(1.0)).round(4).tolist()
        [3.0, 3.0]

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, appendix
    B.3, with a Gaussian in place of Dirac masses.
    """

    mean: Float[Array, " *shape"]
    variances: Float[Array, "..."]
    basis: Float[Array, " d d"] | None

    def __init__(self, mean: Inexact[ArrayLike, " *shape"], cov: Inexact[ArrayLike, "..."]):
        check_finite("mean", mean)
        self.mean = as_number(mean)
        self.variances, self.basis = factor(cov, self.mean.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.mean.shape

    @property
    def cov(self) -> Float[Array, " d d"]:
        """Covariance as a matrix over the flattened example."""
        return as_matrix(self._covariance, self.shape)

    @property
    def _covariance(self) -> Covariance:
        return Covariance(self.variances, self.basis)

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        """Posterior mean; see `Denoiser`. There is nothing to condition on: `cond` must be `None`."""
        label_mask(None, None, cond)
        x = as_example(x, self.shape)
        # In the precision of the parameters, given back in that of the example.
        return posterior_mean(x, as_level(sigma, x), self.mean, self._covariance).astype(x.dtype)

    def log_density(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Float[Array, ""]:
        """Log-density of the noisy example under `N(mean, cov + sigma^2 I)`.

        Args:
            x: noisy example.
            sigma: noise level; positive where the covariance is singular.
            cond: must be `None`.

        Returns:
            The log-density, a scalar.
        """
        label_mask(None, None, cond)
        x = as_example(x, self.shape)
        return log_normal(x, as_level(sigma, x), self.mean, self._covariance)

    def sample(self, num_samples: int, *, cond: PyTree = None, key: Key[Array, ""]) -> Float[Array, " n *shape"]:
        """Draw clean examples.

        Args:
            num_samples: number of draws.
            cond: must be `None`.
            key: typed PRNG key.

        Returns:
            Examples `(num_samples, *shape)`.
        """
        label_mask(None, None, cond)
        check_count("num_samples", num_samples)
        check_key(key)
        white = jr.normal(key, (num_samples, *self.shape), self.mean.dtype)
        return jax.vmap(color, in_axes=(0, None, None))(white, self.mean, self._covariance)
