"""Arguments of bridges: numbers of one floating dtype, times in [0, 1], samples that a fit can use."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from genkit._core._checks import check, check_finite, check_interval, check_positive, check_shape, fail, is_concrete
from genkit._core._fields import as_number


Scalar = Real[ArrayLike, ""]


def as_floats(*values: Shaped[ArrayLike, " ..."]) -> tuple[Float[Array, " ..."], ...]:
    """Arrays of one floating dtype, float32 at least: integers become floats, and half precision has too few digits."""
    arrays = [as_number(value) for value in values]
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(array.astype(dtype) for array in arrays)


def check_epsilon(epsilon: Scalar) -> None:
    """Refuse a concrete epsilon that is not a positive finite scalar."""
    check(np.ndim(epsilon) == 0, "epsilon", "a scalar, the variance of the reference at t = 1", epsilon)
    check_positive("epsilon", epsilon)
    if is_concrete(epsilon):
        check_finite("epsilon", np.asarray(epsilon))


def check_times(ts: Real[ArrayLike, " n"], *, start: Scalar = 0.0, strict: bool = False) -> None:
    """Refuse concrete times that do not increase within [start, 1]."""
    check(np.ndim(ts) == 1 and np.shape(ts)[0] > 0, "ts", "a one-dimensional array of times", ts)
    check_interval("start", start, 0.0, 1.0)
    check_interval("ts", ts, 0.0, 1.0)
    if not (is_concrete(ts) and is_concrete(start)):
        return
    gaps = np.diff(np.concatenate([[np.asarray(start, float)], np.asarray(ts, float)]))
    if strict and not (gaps[1:] > 0).all():
        fail("ts", "strictly increasing", f"a smallest gap of {gaps[1:].min():.3g}")
    if not strict and not (gaps >= 0).all():
        hint = "The state given to `sample` is that at `start`."
        fail("ts", "non-decreasing from `start` on", f"a gap of {gaps.min():.3g}", hint)


def check_points(name: str, x: Shaped[ArrayLike, " *batch d"], dim: int) -> None:
    """Refuse points of another dimension, and known ones that are not finite."""
    leading = [None] * (max(np.ndim(x), 1) - 1)
    check_shape(name, x, (*leading, dim), "The last axis is the space of the bridge.")
    check_finite(name, x)


def check_sample(name: str, x: Shaped[ArrayLike, " n d"], dim: int) -> None:
    """Refuse anything but finite points (n, d), at least one."""
    check_shape(name, x, (None, dim), "One point per row.")
    check(np.shape(x)[0] > 0, name, "non-empty", "no points")
    check_finite(name, x)


def check_covariance(name: str, cov: Shaped[ArrayLike, " ..."], dim: int) -> Float[Array, " *k d d"]:
    """`cov` (one or a stack of full matrices) as floats; refuse degenerate concrete ones."""
    matrices = as_floats(cov)[0]
    check_shape(name, matrices, (*matrices.shape[:-2], dim, dim), "Covariances are symmetric matrices, one per mean.")
    check_finite(name, cov)
    if not is_concrete(cov):
        return matrices
    values = np.asarray(cov, np.float64)
    asymmetry = float(np.abs(values - values.swapaxes(-1, -2)).max())
    if asymmetry > 1e-5 * np.abs(values).max():
        fail(name, "symmetric", f"an asymmetry of {asymmetry:.3g}")
    eigenvalues = np.linalg.eigvalsh(values)
    # Relative to the largest: units are the user's business, the condition is not.
    smallest = float((eigenvalues[..., 0] / eigenvalues[..., -1]).min())
    if not smallest > 10 * dim * float(jnp.finfo(matrices.dtype).eps):
        hint = "Add a small multiple of the identity, or leave out constant and duplicate coordinates."
        fail(name, "positive definite", f"a smallest relative eigenvalue of {smallest:.3g}", hint)
    return matrices


def check_samples(
    x0: Shaped[ArrayLike, " n _"], x1: Shaped[ArrayLike, " m _"], num_components: int, scale: str
) -> tuple[Float[Array, " n d"], Float[Array, " m d"]]:
    """Both sample sets as floats; refuse different spaces, too few points and degenerate distributions."""
    for name, x in (("x0", x0), ("x1", x1)):
        check_shape(name, x, (None, None), "One sample per row.")
        check_finite(name, x)
        check(not jnp.issubdtype(jnp.result_type(x), jnp.complexfloating), name, "real", x)
    check_shape("x1", x1, (None, np.shape(x0)[1]), "Both ends live in one space.")
    count = min(np.shape(x0)[0], np.shape(x1)[0])
    if count < max(2 * num_components, 2):
        hint = f"Take fewer components than {num_components}, or more samples."
        fail("x0 and x1", f"at least {2 * num_components} samples each", f"{count}", hint)
    for name, x in (("x0", x0), ("x1", x1)):
        _check_spread(name, np.asarray(x, np.float64), needs_rank=scale in ("full", "lowrank"))
    x0, x1 = as_floats(x0, x1)
    return x0, x1


def _check_spread(name: str, x: np.ndarray, *, needs_rank: bool) -> None:
    """Refuse samples without variance in some coordinate, or in some direction where covariances are matrices."""
    std = x.std(0)
    # A coordinate that does not vary has no scale, and its component no finite likelihood.
    if not std.min() > 1e-6 * std.max():
        got = f"a standard deviation of {std.min():.3g} in coordinate {int(std.argmin())}"
        hint = "Leave out constant coordinates, or add noise; divide coordinates by their standard deviations where "
        fail(name, "of nonzero variance in every coordinate", got, hint + "their units differ.")
    if not needs_rank:
        return
    values = np.linalg.eigvalsh(np.atleast_2d(np.cov(x.T)))
    if not values[0] > 1e-9 * values[-1]:
        got = f"a smallest relative eigenvalue of {values[0] / values[-1]:.3g}"
        hint = "Project on principal components, divide coordinates by their standard deviations, add noise, or use "
        fail(name, "of full-rank covariance", got, hint + "scale='diag'.")
