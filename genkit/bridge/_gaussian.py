"""The bridge between two Gaussians in closed form."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from genkit._core._checks import check_finite, check_positive, check_shape
from genkit._core._fields import as_number
from genkit.bridge._bridge import Bridge
from genkit.bridge._inputs import as_floats, check_covariance, check_epsilon
from genkit.bridge._potential import MixturePotential
from genkit.bridge._scales import Diag, full_from_dense


def symmetric_function(function: Callable[[Array], Array], matrix: Float[Array, " *k d d"]) -> Float[Array, " *k d d"]:
    """A function of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * function(values)[..., None, :]) @ vectors.mT


def riccati(
    cov0: Float[Array, " *#k d d"], cov1: Float[Array, " *#k d d"], epsilon: Float[ArrayLike, ""]
) -> Float[Array, " *#k d d"]:
    r"""The positive solution of $S \Sigma_0 S + \epsilon S = \Sigma_1$: the scale of the bridge between Gaussians.

    Args:
        cov0: covariance at t = 0, shape (..., d, d).
        cov1: covariance at t = 1, shape (..., d, d).
        epsilon: variance of the reference at t = 1.

    Returns:
        S, shape (..., d, d).

    """
    root = symmetric_function(jnp.sqrt, cov0)
    unroot = symmetric_function(lambda s: 1.0 / jnp.sqrt(s), cov0)
    # sqrt(s + e^2/4) - e/2 without its cancellation at large epsilon.
    half = epsilon / 2.0
    inner = symmetric_function(lambda s: s / (jnp.sqrt(jnp.maximum(s, 0.0) + half**2) + half), root @ cov1 @ root)
    scale = unroot @ inner @ unroot
    return 0.5 * (scale + scale.mT)


def gaussian(
    mean0: Shaped[ArrayLike, " d"],
    cov0: Shaped[ArrayLike, " _ _"] | Shaped[ArrayLike, " _"],
    mean1: Shaped[ArrayLike, " _"],
    cov1: Shaped[ArrayLike, " _ _"] | Shaped[ArrayLike, " _"],
    epsilon: Real[ArrayLike, ""],
) -> Bridge:
    r"""The bridge between two Gaussians: one component, no fitting.

    $S \Sigma_0 S + \epsilon S = \Sigma_1$ and $r = \mu_1 - S\mu_0$: then $X_1 \mid x_0 \sim N(r + S x_0, \epsilon S)$.

    Args:
        mean0: mean at t = 0, shape (d,).
        cov0: covariance at t = 0, shape (d, d), or its diagonal, shape (d,).
        mean1: mean at t = 1, shape (d,).
        cov1: covariance at t = 1, shape (d, d), or its diagonal, shape (d,).
        epsilon: variance of the reference at t = 1.

    Returns:
        A bridge that knows its source: marginals, score and reverse need nothing more.

    Raises:
        ValueError: if epsilon is not positive, dimensions differ or a covariance is degenerate.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(1), jnp.ones(1), jnp.zeros(1), jnp.ones(1), 1.0)
        >>> print(round(float(bridge.potential.scale.dense(1)[0, 0, 0]), 6))  # the golden ratio less one
        0.618034

    Source: Bunne, Hsieh, Cuturi, Krause, "The Schrödinger bridge between Gaussian measures has a closed form",
    AISTATS 2023, theorem 1; in the form above, re-derived.
    """
    check_epsilon(epsilon)
    check_shape("mean0", mean0, (None,))
    dim = np.shape(mean0)[0]
    check_shape("mean1", mean1, (dim,), "Both ends live in one space.")
    check_finite("mean0", mean0)
    check_finite("mean1", mean1)
    is_diagonal = np.ndim(cov0) == 1 and np.ndim(cov1) == 1
    covs = []
    for name, cov in (("cov0", cov0), ("cov1", cov1)):
        if np.ndim(cov) == 1:
            check_shape(name, cov, (dim,), "One variance per coordinate.")
            check_positive(name, cov)
            check_finite(name, cov)
            covs.append(as_number(cov))
        else:
            covs.append(check_covariance(name, cov, dim))
    mean0, mean1, cov0, cov1 = as_floats(mean0, mean1, *covs)
    epsilon = jnp.asarray(epsilon, mean1.dtype)
    if is_diagonal:
        # d scalar problems
        cov0 = cov0[:, None, None]
        cov1 = cov1[:, None, None]
    elif cov0.ndim == 1:
        cov0 = jnp.diag(cov0)
    elif cov1.ndim == 1:
        cov1 = jnp.diag(cov1)

    def potential(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> MixturePotential:
        scales = riccati(cov_a, cov_b, epsilon)
        # In coordinates centered at the target mean, r = S (mean_b - mean_a).
        if is_diagonal:
            scales = scales[:, 0, 0]
            shift = scales * (mean_b - mean_a)
            scale = Diag(jnp.log(scales)[None])
        else:
            shift = scales @ (mean_b - mean_a)
            scale = full_from_dense(scales[None])
        return MixturePotential(jnp.zeros(1, shift.dtype), shift[None], scale, epsilon, mean_b)

    forward = potential(mean0, cov0, mean1, cov1)
    backward = potential(mean1, cov1, mean0, cov0)
    if is_diagonal:
        logdet = jnp.sum(jnp.log(cov0))
    else:
        logdet = jnp.linalg.slogdet(cov0)[1]
    peak = -0.5 * (dim * jnp.log(2.0 * jnp.pi) + logdet)
    gauge = peak - forward.log_value(mean0, 0.0) - backward.log_value(mean0, 1.0)
    return Bridge(forward, backward=backward.shifted(gauge))
