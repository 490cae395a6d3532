"""The exact denoiser of a finite data set."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact, Int, Key, PyTree

from genkit._core._checks import check, check_count, check_finite, check_key, check_positive
from genkit._core._fields import as_number
from genkit.diffusion._denoisers._inputs import as_example, as_level
from genkit.diffusion._denoisers._labels import check_labels, draw_members, label_mask
from genkit.sampling import Denoiser


class EmpiricalDenoiser(Denoiser):
    r"""The exact denoiser of a finite data set: an average of its members, weighted by how likely each became `x`.

    $$D(x, \sigma, c) = \sum_i r_i x_i, \qquad r_i \propto e^{-|x - x_i|^2 / 2\sigma^2} [l_i = c].$$

    At $\sigma = 0$ it is the nearest member (the mean of the nearest ones). It is what a network of unlimited capacity
    converges to, and the yardstick for memorization.

    Args:
        data: examples `(n, *shape)`.
        labels: label of each example `(n,)`, integers 0, 1, ..., each used at least once; `None` for data that take no
            condition.
        num_labels: number of labels; needed only with labels that are traced, as under `jax.jit`.

    Raises:
        ValueError: for labels that do not fit.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.EmpiricalDenoiser(jnp.array([[0.0], [1.0]]))
        >>> denoiser(jnp.array([0.5]), jnp.array(0.1)).tolist(), denoiser(jnp.array([0.6]), jnp.array(0.0)).tolist()
        ([0.5], [1.0])

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, equation
    57.
    """

    data: Float[Array, " n *shape"]
    labels: Int[Array, " n"] | None
    num_labels: int | None = eqx.field(static=True)

    def __init__(
        self,
        data: Inexact[ArrayLike, " n *shape"],
        labels: Int[ArrayLike, " n"] | None = None,
        *,
        num_labels: int | None = None,
    ):
        check_finite("data", data)
        self.data = as_number(data)
        check(self.data.ndim >= 1, "data", "of shape (n, *shape)", f"shape {self.data.shape}")
        check_count("number of examples", self.data.shape[0])
        self.labels, self.num_labels = check_labels(labels, self.data.shape[0], "example", num_labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.data.shape[1:]

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        """The posterior mean; see `Denoiser`. The condition is a label; `None` and -1 admit every example."""
        x = as_example(x, self.shape)
        logits, _ = self._logits(x, as_level(sigma, x), cond)
        return jnp.tensordot(jax.nn.softmax(logits), self.data, 1).astype(x.dtype)

    def log_density(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Float[Array, ""]:
        """Log-density of the noisy example, given the label where there is one.

        Args:
            x: noisy example.
            sigma: noise level, positive.
            cond: label; `None` and -1 stand for all data.

        Returns:
            The log-density, a scalar.
        """
        check_positive("sigma", sigma)
        x = as_example(x, self.shape)
        level = jnp.asarray(sigma, x.dtype)
        logits, nearest = self._logits(x, level, cond)
        count = jnp.sum(self._admitted(cond), dtype=x.dtype)
        constant = jnp.log(count) + x.size * (jnp.log(level) + 0.5 * math.log(2 * math.pi))
        return jax.nn.logsumexp(logits) - 0.5 * nearest / level**2 - constant

    def sample(self, num_samples: int, *, cond: PyTree = None, key: Key[Array, ""]) -> Float[Array, " n *shape"]:
        """Draw members of the data, with replacement.

        Args:
            num_samples: number of draws.
            cond: label, or labels `(num_samples,)`; `None` and -1 stand for all data.
            key: typed PRNG key.

        Returns:
            Examples `(num_samples, *shape)`.
        """
        check_count("num_samples", num_samples)
        check_key(key)

        def log_prior(one: PyTree) -> Array:
            return jnp.log(self._admitted(one).astype(self.data.dtype))

        return self.data[draw_members(log_prior, self.data.shape[0], num_samples, cond, key=key)]

    def _admitted(self, cond: PyTree) -> Array:
        """Mask of the examples that a condition admits."""
        mask = label_mask(self.labels, self.num_labels, cond)
        if mask is None:
            return jnp.ones(self.data.shape[0], bool)
        return mask

    def _logits(self, x: Array, sigma: Array, cond: PyTree) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        """Log-likelihood of every admitted example relative to the nearest one's, and its squared distance."""
        # Differences before squares: expanding the square would cost all digits where sigma is small.
        squares = jnp.sum((x - self.data) ** 2, axis=tuple(range(1, self.data.ndim)))
        admitted = self._admitted(cond)
        nearest = jnp.min(jnp.where(admitted, squares, jnp.inf))
        gap = jnp.where(admitted, squares, nearest) - nearest
        # The floor keeps the square of the variance, which the gradient divides by, a normal number. Members so far out
        # that their share is zero in any precision are cut off before the division, which could overflow.
        twice_variance = jnp.maximum(2 * sigma**2, jnp.sqrt(jnp.finfo(x.dtype).tiny))
        admitted &= gap < 2e3 * twice_variance
        return jnp.where(admitted, -jnp.where(admitted, gap, 0) / twice_variance, -jnp.inf), nearest
