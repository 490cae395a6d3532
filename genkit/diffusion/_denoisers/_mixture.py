"""The exact denoiser of a mixture of Gaussians."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Int, Key, PyTree

from genkit._core._checks import check, check_count, check_finite, check_interval, check_key, is_concrete
from genkit._core._fields import as_number
from genkit.diffusion._denoisers._covariance import (
    Covariance,
    as_matrix,
    color,
    factor,
    log_normal,
    over_members,
    posterior_mean,
)
from genkit.diffusion._denoisers._inputs import as_example, as_level
from genkit.diffusion._denoisers._labels import check_labels, draw_members, label_mask
from genkit.sampling import Denoiser


# Draws of a mixture with full covariances gather one matrix each: so many at a time.
_DRAWS_AT_ONCE = 512


class MixtureDenoiser(Denoiser):
    r"""The exact denoiser of a mixture of Gaussians, whose components may carry labels.

    $$D(x, \sigma, c) = \sum_k r_k(x, \sigma, c)\, D_k(x, \sigma), \qquad
      r_k \propto w_k\, N(x \mid \mu_k, \Sigma_k + \sigma^2 I)\, [l_k = c],$$

    with $D_k$ the denoiser of component $k$. Without a condition all components count.

    Args:
        weights: weights of the components `(k,)`, non-negative; normalized to sum to one.
        means: means `(k, *shape)`.
        covs: covariances: one variance `()`, one for each component `(k,)`, diagonals `(k, *shape)` or matrices
            `(k, d, d)`; positive semi-definite.
        labels: label of each component `(k,)`, integers 0, 1, ..., each used at least once; `None` for a mixture that
            takes no condition.
        num_labels: number of labels; needed only with labels that are traced, as under `jax.jit`.

    Raises:
        ValueError: for shapes that do not fit, negative weights, covariances that are not positive semi-definite,
            labels that leave out a number, a label whose components all have weight zero.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> means = jnp.array([[-1.0], [1.0]])
        >>> denoiser = gk.diffusion.MixtureDenoiser(jnp.ones(2), means, jnp.array(0.01), labels=jnp.array([0, 1]))
        >>> x, sigma = jnp.zeros(1), jnp.array(1.0)
        >>> [round(float(denoiser(x, sigma, cond)[0]), 2) for cond in (None, 0, 1)]
        [0.0, -0.99, 0.99]
    """

    log_weights: Float[Array, " k"]
    means: Float[Array, " k *shape"]
    variances: Float[Array, "..."]
    basis: Float[Array, " k d d"] | None
    labels: Int[Array, " k"] | None
    num_labels: int | None = eqx.field(static=True)

    def __init__(
        self,
        weights: Inexact[ArrayLike, " k"],
        means: Inexact[ArrayLike, " k *shape"],
        covs: Inexact[ArrayLike, "..."],
        labels: Int[ArrayLike, " k"] | None = None,
        *,
        num_labels: int | None = None,
    ):
        check_finite("means", means)
        check_finite("weights", weights)
        check_interval("weights", weights, 0.0)
        # What is known is looked at on the host, also inside jit, where its JAX form is already traced.
        known_weights = np.asarray(weights) if is_concrete(weights) else None
        known_labels = np.asarray(labels) if labels is not None and is_concrete(labels) else None
        self.means = as_number(means)
        weights = as_number(weights)
        check(self.means.ndim >= 1, "means", "of shape (components, *shape)", f"shape {self.means.shape}")
        count = self.means.shape[0]
        check_count("number of components", count)
        check(weights.shape == (count,), "weights", f"of shape ({count},), as `means`", f"shape {weights.shape}")
        self.labels, self.num_labels = check_labels(labels, count, "component", num_labels)
        if known_weights is not None:
            _check_weights(known_weights, known_labels, self.num_labels)
        # Logarithms, because shares of far components underflow.
        self.log_weights = jnp.log(weights) - jnp.log(jnp.sum(weights))
        self.variances, self.basis = factor(covs, self.shape, (count,), "covs")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.means.shape[1:]

    @property
    def weights(self) -> Float[Array, " k"]:
        """Weights of the components, which sum to one."""
        return jax.nn.softmax(self.log_weights)

    @property
    def covs(self) -> Float[Array, " k d d"]:
        """Covariances as matrices over the flattened example."""

        def one(mean: Array, covariance: Covariance) -> Array:
            del mean
            return as_matrix(covariance, self.shape)

        return over_members(one, self.means, self._covariances)

    @property
    def _covariances(self) -> Covariance:
        return Covariance(self.variances, self.basis)

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        """Posterior mean; see `Denoiser`. The condition is a label; `None` and -1 admit every component."""
        x = as_example(x, self.shape)
        level = as_level(sigma, x)

        def one(mean: Array, covariance: Covariance) -> Array:
            return posterior_mean(x, level, mean, covariance)

        shares = jax.nn.softmax(self._log_joint(x, level, self._log_prior(cond)))
        return jnp.tensordot(shares, over_members(one, self.means, self._covariances), 1).astype(x.dtype)

    def log_density(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Float[Array, ""]:
        """Log-density of the noisy example, given the label where there is one.

        Args:
            x: noisy example.
            sigma: noise level; positive where a covariance is singular.
            cond: label; `None` and -1 stand for the whole mixture.

        Returns:
            The log-density, a scalar.
        """
        x = as_example(x, self.shape)
        return jax.nn.logsumexp(self._log_joint(x, as_level(sigma, x), self._log_prior(cond)))

    def sample(self, num_samples: int, *, cond: PyTree = None, key: Key[Array, ""]) -> Float[Array, " n *shape"]:
        """Draw clean examples.

        Args:
            num_samples: number of draws.
            cond: label, or labels `(num_samples,)`; `None` and -1 stand for the whole mixture.
            key: typed PRNG key.

        Returns:
            Examples `(num_samples, *shape)`.
        """
        check_count("num_samples", num_samples)
        check_key(key)
        key_member, key_white = jr.split(key)
        member = draw_members(self._log_prior, self.log_weights.shape[0], num_samples, cond, key=key_member)
        white = jr.normal(key_white, (num_samples, *self.shape), self.means.dtype)

        def draw(one: tuple[Array, Array]) -> Array:
            k, noise = one
            return color(noise, self.means[k], jax.tree.map(lambda leaf: leaf[k], self._covariances))

        return jax.lax.map(draw, (member, white), batch_size=min(num_samples, _DRAWS_AT_ONCE))

    def _log_prior(self, cond: PyTree) -> Float[Array, " k"]:
        """Log-weights of the components a condition admits, normalized among them."""
        admitted = label_mask(self.labels, self.num_labels, cond)
        if admitted is None:
            return jax.nn.log_softmax(self.log_weights)
        return jax.nn.log_softmax(jnp.where(admitted, self.log_weights, -jnp.inf))

    def _log_joint(self, x: Array, sigma: Array, log_prior: Array) -> Float[Array, " k"]:
        """Logarithm of prior times likelihood of every component."""

        def one(mean: Array, covariance: Covariance) -> Array:
            return log_normal(x, sigma, mean, covariance)

        return log_prior + over_members(one, self.means, self._covariances)


def _check_weights(weights: np.ndarray, labels: np.ndarray | None, num_labels: int | None) -> None:
    """Refuse weights that are all zero, or all zero for a label."""
    if not weights.sum() > 0:
        raise ValueError("`weights` must be positive for some component; got zeros.")
    if labels is None or num_labels is None:
        return
    for label in range(num_labels):
        if not weights[labels == label].sum() > 0:
            raise ValueError(f"`weights` must be positive for some component of label {label}; got zeros.")
