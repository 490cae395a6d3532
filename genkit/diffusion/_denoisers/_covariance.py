"""Covariances of Gaussians (a variance, a diagonal or a matrix), factorized once, and what denoising needs of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from genkit._core._checks import check_finite, check_interval, is_concrete
from genkit._core._fields import as_number


class Covariance(NamedTuple):
    """Variances along the coordinates (a scalar, or one for each), or along the columns of `basis`."""

    variances: Float[Array, "..."]
    basis: Float[Array, "... d d"] | None


def factor(cov: ArrayLike, shape: tuple[int, ...], batch: tuple[int, ...] = (), name: str = "cov") -> Covariance:
    """Recognize the kind of a covariance (or of a stack of them) by its shape and factorize it.

    Args:
        cov: variances of shape `()` or `batch`, diagonals `batch + shape`, or matrices `batch + (d, d)`.
        shape: shape of one example, of `d` entries.
        batch: shape of the stack.
        name: what to call it in errors.

    Returns:
        The factorized covariance.

    Raises:
        ValueError: for another shape, or a covariance that is not symmetric positive semi-definite.
    """
    # What is known is looked at on the host, also inside jit, where its JAX form is already traced.
    known = np.asarray(cov, np.float64) if is_concrete(cov) else None
    cov = as_number(cov)
    size = int(np.prod(shape))
    kinds = {"a variance": batch, "a diagonal": (*batch, *shape), "a matrix": (*batch, size, size)}
    if cov.shape not in {(), *kinds.values()}:
        expected = ", ".join(f"{kind} {dims}" for kind, dims in kinds.items())
        raise ValueError(f"`{name}` must be of shape {expected}; got shape {cov.shape}.")
    if known is not None:
        check_finite(name, known)
    # A diagonal first: where both fit, the example has one entry and they agree.
    if cov.shape == () or cov.shape != kinds["a matrix"] or cov.shape in (kinds["a variance"], kinds["a diagonal"]):
        if known is not None:
            check_interval(name, known, 0.0)
        if cov.shape == ():
            cov = jnp.broadcast_to(cov, batch)
        return Covariance(cov, None)
    if known is None:
        variances, basis = jnp.linalg.eigh(cov)
        return Covariance(jnp.maximum(variances, 0), basis)
    scale = np.abs(known).max(initial=0.0)
    # What rounding to the dtype of the argument may have done to a covariance.
    tolerance = 16 * size * float(jnp.finfo(cov.dtype).eps) * scale
    skew = np.abs(known - known.swapaxes(-1, -2)).max(initial=0.0)
    if skew > tolerance:
        raise ValueError(f"`{name}` must be symmetric; got entries that differ from their mirror image by {skew:.3g}.")
    variances, basis = np.linalg.eigh((known + known.swapaxes(-1, -2)) / 2)
    lowest = variances.min(initial=0.0)
    if lowest < -tolerance:
        raise ValueError(f"`{name}` must be positive semi-definite; got an eigenvalue of {lowest:.3g}.")
    return Covariance(jnp.asarray(np.maximum(variances, 0), cov.dtype), jnp.asarray(basis, cov.dtype))


def posterior_mean(
    x: Float[Array, " *shape"], sigma: Float[Array, ""], mean: Float[Array, " *shape"], covariance: Covariance
) -> Float[Array, " *shape"]:
    """Mean of `x0` given `x = x0 + sigma * eps` for one Gaussian."""
    variances = covariance.variances
    total = variances + sigma**2
    # A direction without variance stays at the mean, also at sigma = 0, where the quotient is 0 / 0.
    safe_total = jnp.where(total == 0, 1, total)
    kept = variances / safe_total
    lost = jnp.where(total == 0, 1, sigma**2 / safe_total)
    # Little noise: x minus what is lost; much noise: the mean plus what is kept. Either way the digits that matter.
    if covariance.basis is None:
        little = variances > sigma**2
        return jnp.where(little, x - lost * (x - mean), mean + kept * (x - mean))
    little = jnp.max(variances) > sigma**2
    along = (x - mean).ravel() @ covariance.basis
    step = covariance.basis @ jnp.where(little, -lost * along, kept * along)
    return jnp.where(little, x, mean) + step.reshape(x.shape)


def log_normal(
    x: Float[Array, " *shape"], sigma: Float[Array, ""], mean: Float[Array, " *shape"], covariance: Covariance
) -> Float[Array, ""]:
    """Log-density at `x` of one Gaussian after noise of standard deviation `sigma`."""
    along = x - mean
    if covariance.basis is not None:
        along = along.ravel() @ covariance.basis
    total = covariance.variances + sigma**2
    logs = jnp.broadcast_to(jnp.log(2 * jnp.pi * total), along.shape)
    return -0.5 * jnp.sum((along / jnp.sqrt(total)) ** 2 + logs)


def color(
    white: Float[Array, " *shape"], mean: Float[Array, " *shape"], covariance: Covariance
) -> Float[Array, " *shape"]:
    """A draw of one Gaussian from a draw of the standard one."""
    scales = jnp.sqrt(covariance.variances)
    if covariance.basis is None:
        return mean + scales * white
    return mean + (covariance.basis @ (scales * white.ravel())).reshape(mean.shape)


def as_matrix(covariance: Covariance, shape: tuple[int, ...]) -> Float[Array, " d d"]:
    """Matrix over the flattened example."""
    size = int(np.prod(shape))
    if covariance.basis is None:
        return jnp.diag(jnp.broadcast_to(covariance.variances, shape).ravel())
    if size == 0:
        return jnp.zeros((0, 0))
    return (covariance.basis * covariance.variances) @ covariance.basis.T


def over_members(
    function: Callable[[Array, Covariance], Array], means: Float[Array, " k *shape"], covariances: Covariance
) -> Array:
    """Results `(k, ...)` of a function of mean and covariance for each of a stack of Gaussians."""
    # An absent basis is no leaf: the axes are a tree of the same structure.
    axes = jax.tree.map(lambda _: 0, covariances)
    return jax.vmap(function, in_axes=(0, axes))(means, covariances)
