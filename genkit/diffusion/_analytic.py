"""Denoisers in closed form: Gaussian data and mixtures of Gaussians."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Inexact, Int, Key

from genkit._core import Denoiser
from genkit._core._checks import check, check_count, check_finite, check_interval, check_key, is_concrete
from genkit._core._fields import as_number

from ._gaussians import (
    Spread,
    check_labels,
    color,
    factor,
    label_mask,
    log_normal,
    matrix,
    posterior_mean,
    vmap_members,
)


# Draws of a mixture with full covariances gather one matrix each: so many at a time.
_DRAWS_AT_ONCE = 512


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
        self.mean = as_number(mean)
        check_finite("mean", self.mean)
        self.variances, self.basis = factor(cov, self.mean.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.mean.shape

    @property
    def cov(self) -> Float[Array, " d d"]:
        """The covariance as a matrix over the flattened example."""
        return matrix(Spread(self.variances, self.basis), self.shape)

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: Any = None
    ) -> Inexact[Array, " *shape"]:
        """The posterior mean; see `Denoiser`. There is nothing to condition on: `cond` must be `None`."""
        label_mask(None, None, cond)
        x = as_number(x)
        check(x.shape == self.shape, "x", f"of shape {self.shape}", f"shape {x.shape}")
        mean = posterior_mean(x, _level(sigma, x), self.mean, Spread(self.variances, self.basis))
        return mean.astype(x.dtype)

    def log_density(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: Any = None
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
        x = as_number(x)
        check(x.shape == self.shape, "x", f"of shape {self.shape}", f"shape {x.shape}")
        return log_normal(x, _level(sigma, x), self.mean, Spread(self.variances, self.basis))

    def sample(self, num_samples: int, *, cond: Any = None, key: Key[Array, ""]) -> Float[Array, " n *shape"]:
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
        return jax.vmap(color, in_axes=(0, None, None))(white, self.mean, Spread(self.variances, self.basis))


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
    ):
        self.means, weights = as_number(means), as_number(weights)
        check(self.means.ndim >= 1, "means", "of shape (components, *shape)", f"shape {self.means.shape}")
        count = self.means.shape[0]
        check_count("number of components", count)
        check(weights.shape == (count,), "weights", f"of shape ({count},), as `means`", f"shape {weights.shape}")
        check_finite("means", self.means)
        check_finite("weights", weights)
        check_interval("weights", weights, 0.0)
        self.labels, self.num_labels = check_labels(labels, count, "component")
        for label in [None] if self.num_labels is None else [None, *range(self.num_labels)]:
            members = weights if label is None else jnp.where(self.labels == label, weights, 0)
            if is_concrete(members):
                what = "positive for some component" + ("" if label is None else f" of label {label}")
                check(bool(members.sum() > 0), "weights", what, "zeros")
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
        """The covariances as matrices over the flattened example."""
        return vmap_members(lambda _, spread: matrix(spread, self.shape), self._spread)(self.means, self._spread)

    @property
    def _spread(self) -> Spread:
        return Spread(self.variances, self.basis)

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: Any = None
    ) -> Inexact[Array, " *shape"]:
        """The posterior mean; see `Denoiser`. The condition is a label; `None` and -1 admit every component."""
        x = as_number(x)
        check(x.shape == self.shape, "x", f"of shape {self.shape}", f"shape {x.shape}")
        level = _level(sigma, x)
        shares = jax.nn.softmax(self._log_joint(x, level, self._log_prior(cond)))
        means = vmap_members(lambda mean, spread: posterior_mean(x, level, mean, spread), self._spread)(
            self.means, self._spread
        )
        return jnp.tensordot(shares, means, 1).astype(x.dtype)

    def log_density(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: Any = None
    ) -> Float[Array, ""]:
        """Log-density of the noisy example, given the label where there is one.

        Args:
            x: noisy example.
            sigma: noise level; positive where a covariance is singular.
            cond: label; `None` and -1 stand for the whole mixture.

        Returns:
            The log-density, a scalar.
        """
        x = as_number(x)
        check(x.shape == self.shape, "x", f"of shape {self.shape}", f"shape {x.shape}")
        return jax.nn.logsumexp(self._log_joint(x, _level(sigma, x), self._log_prior(cond)))

    def sample(self, num_samples: int, *, cond: Any = None, key: Key[Array, ""]) -> Float[Array, " n *shape"]:
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
            return color(noise, self.means[k], jax.tree.map(lambda leaf: leaf[k], self._spread))

        return jax.lax.map(draw, (member, white), batch_size=min(num_samples, _DRAWS_AT_ONCE))

    def _log_prior(self, cond: Any) -> Float[Array, " k"]:
        """Log-weights of the components a condition admits, normalized among them."""
        admitted = label_mask(self.labels, self.num_labels, cond)
        log_weights = self.log_weights if admitted is None else jnp.where(admitted, self.log_weights, -jnp.inf)
        return jax.nn.log_softmax(log_weights)

    def _log_joint(self, x: Array, sigma: Array, log_prior: Array) -> Float[Array, " k"]:
        """Log of prior times likelihood of every component."""
        log_laws = vmap_members(lambda mean, spread: log_normal(x, sigma, mean, spread), self._spread)
        return log_prior + log_laws(self.means, self._spread)


def draw_members(log_prior: Any, size: int, num_samples: int, cond: Any, *, key: Key[Array, ""]) -> Int[Array, " n"]:
    """Draw members of a family of `size` from `log_prior(cond)`, with one condition for all or one for each draw."""
    if cond is None or jnp.ndim(cond) == 0:
        return jr.categorical(key, log_prior(cond), shape=(num_samples,))
    cond = jnp.asarray(cond)
    check(cond.shape == (num_samples,), "cond", f"a label or {num_samples} labels", f"shape {cond.shape}")
    gumbel = jr.gumbel(key, (num_samples, size))
    return jnp.argmax(jax.vmap(log_prior)(cond) + gumbel, axis=-1)


def _level(sigma: Float[ArrayLike, ""], x: Array) -> Float[Array, ""]:
    """The noise level in the precision of the example."""
    check_interval("sigma", sigma, 0.0)
    return jnp.asarray(sigma, x.dtype)
