"""Gaussian laws with scalar, diagonal or full covariance, factorized once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from genkit._core._checks import check, check_finite, check_interval, is_concrete
from genkit._core._fields import as_number


class Spread(NamedTuple):
    """A covariance: variances along the coordinates (a scalar, or one for each), or along the columns of `basis`."""

    variances: Float[Array, "..."]
    basis: Float[Array, "... d d"] | None


def factor(cov: ArrayLike, shape: tuple[int, ...], batch: tuple[int, ...] = (), name: str = "cov") -> Spread:
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
    cov = as_number(cov)
    size = int(np.prod(shape))
    kinds = {"a variance": batch, "a diagonal": (*batch, *shape), "a matrix": (*batch, size, size)}
    expected = ", ".join(f"{kind} {dims}" for kind, dims in kinds.items())
    check(cov.shape in {(), *kinds.values()}, name, f"of shape {expected}", f"shape {cov.shape}")
    check_finite(name, cov)
    # A diagonal first: where both fit, the example has one entry and they agree.
    if cov.shape == () or cov.shape != kinds["a matrix"] or cov.shape in (kinds["a variance"], kinds["a diagonal"]):
        check_interval(name, cov, 0.0)
        return Spread(jnp.broadcast_to(cov, batch) if cov.shape == () else cov, None)
    if not is_concrete(cov):
        variances, basis = jnp.linalg.eigh(cov)
        return Spread(jnp.maximum(variances, 0), basis)
    exact = np.asarray(cov, np.float64)
    scale = np.abs(exact).max(initial=0.0)
    tolerance = 16 * size * float(jnp.finfo(cov.dtype).eps) * scale
    skew = np.abs(exact - exact.swapaxes(-1, -2)).max(initial=0.0)
    check(skew <= tolerance, name, "symmetric", f"entries that differ from their mirror image by {skew:.3g}")
    variances, basis = np.linalg.eigh((exact + exact.swapaxes(-1, -2)) / 2)
    lowest = variances.min(initial=0.0)
    check(lowest >= -tolerance, name, "positive semi-definite", f"an eigenvalue of {lowest:.3g}")
    return Spread(jnp.asarray(np.maximum(variances, 0), cov.dtype), jnp.asarray(basis, cov.dtype))


def posterior_mean(
    x: Float[Array, " *shape"], sigma: Float[Array, ""], mean: Float[Array, " *shape"], spread: Spread
) -> Float[Array, " *shape"]:
    """The mean of `x0` given `x = x0 + sigma * eps` for one Gaussian."""
    variances = spread.variances
    total = variances + sigma**2
    # A direction without variance stays at the mean, also at sigma = 0, where the quotient is 0 / 0.
    safe_total = jnp.where(total == 0, 1, total)
    kept, lost = variances / safe_total, jnp.where(total == 0, 1, sigma**2 / safe_total)
    # Little noise: x minus what is lost; much noise: the mean plus what is kept. Either way the digits that matter.
    if spread.basis is None:
        little = variances > sigma**2
        return jnp.where(little, x - lost * (x - mean), mean + kept * (x - mean))
    little = jnp.max(variances) > sigma**2
    along = (x - mean).ravel() @ spread.basis
    step = spread.basis @ jnp.where(little, -lost * along, kept * along)
    return jnp.where(little, x, mean) + step.reshape(x.shape)


def log_normal(
    x: Float[Array, " *shape"], sigma: Float[Array, ""], mean: Float[Array, " *shape"], spread: Spread
) -> Float[Array, ""]:
    """Log-density at `x` of one Gaussian after noise of standard deviation `sigma`."""
    along = x - mean if spread.basis is None else (x - mean).ravel() @ spread.basis
    total = spread.variances + sigma**2
    logs = jnp.broadcast_to(jnp.log(2 * jnp.pi * total), along.shape)
    return -0.5 * jnp.sum((along / jnp.sqrt(total)) ** 2 + logs)


def color(white: Float[Array, " *shape"], mean: Float[Array, " *shape"], spread: Spread) -> Float[Array, " *shape"]:
    """A draw of one Gaussian from a draw of the standard one."""
    scales = jnp.sqrt(spread.variances)
    if spread.basis is None:
        return mean + scales * white
    return mean + (spread.basis @ (scales * white.ravel())).reshape(mean.shape)


def matrix(spread: Spread, shape: tuple[int, ...]) -> Float[Array, " d d"]:
    """The covariance matrix of one Gaussian."""
    size = int(np.prod(shape))
    if spread.basis is None:
        return jnp.diag(jnp.broadcast_to(spread.variances, shape).ravel())
    return (spread.basis * spread.variances) @ spread.basis.T if size else jnp.zeros((0, 0))


def label_mask(labels: Array | None, num_labels: int | None, cond: object) -> Array | None:
    """Which members of a labelled family a condition admits; `None` for all.

    Args:
        labels: label of each member, or `None` for a family without labels.
        num_labels: number of labels.
        cond: one integer label, -1 or `None` for all.

    Returns:
        A mask, or `None` where nothing is masked.

    Raises:
        ValueError: for a condition on a family without labels, or one that is no label.
    """
    if cond is None:
        return None
    check(labels is not None, "cond", "None, because this law was given no labels", cond, "Pass `labels=`.")
    assert labels is not None and num_labels is not None
    cond = jnp.asarray(cond)
    integer = cond.shape == () and jnp.issubdtype(cond.dtype, jnp.integer)
    check(integer, "cond", "one integer label (-1 for all)", cond)
    if is_concrete(cond):
        check(-1 <= int(cond) < num_labels, "cond", f"a label below {num_labels}, or -1 for all", int(cond))
    return (labels == cond) | (cond < 0)


def check_labels(labels: ArrayLike | None, size: int, name: str) -> tuple[Array | None, int | None]:
    """Labels as an array of one label for each of `size` members, and the number of labels."""
    if labels is None:
        return None, None
    labels = jnp.asarray(labels)
    check(jnp.issubdtype(labels.dtype, jnp.integer), "labels", "integers", labels)
    check(labels.shape == (size,), "labels", f"of shape ({size},), one for each {name}", f"shape {labels.shape}")
    check(is_concrete(labels), "labels", "concrete, because their number is part of the structure", "a traced value")
    present = np.unique(np.asarray(labels))
    complete = present[0] == 0 and present[-1] == len(present) - 1
    check(complete, "labels", "0, 1, ..., each with at least one member", f"labels {present[:10].tolist()}")
    return labels.astype(jnp.int32), len(present)


def vmap_members(function, spread: Spread):
    """Map a function `(mean, spread) -> ...` over the members of a stack of Gaussians."""
    return jax.vmap(function, in_axes=(0, jax.tree.map(lambda _: 0, spread)))
