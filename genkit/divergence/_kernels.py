"""Distances between samples from sums over pairs: energy distance, MMD, Cauchy-Schwarz."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from genkit._core._checks import check_positive
from genkit.divergence._pairs import as_samples, common_scale, map_squares, mean_pairs, root


def energy_distance(x: Shaped[ArrayLike, " n *shape"], y: Shaped[ArrayLike, " m *shape"]) -> Float[Array, ""]:
    r"""Energy distance of two samples, $2 E|X - Y| - E|X - X'| - E|Y - Y'|$.

    Expectations are means over all pairs, a point and itself included (V-statistic): never negative, zero for equal
    samples only, and biased upwards by about $E|X - X'|/n + E|Y - Y'|/m$.

    The cost grows like (n + m)^2 d, in memory that does not: about 10 s for two samples of 60,000 points in the plane.

    Args:
        x: first sample `(n, *shape)`.
        y: second sample `(m, *shape)`.

    Returns:
        The distance, a scalar; differentiable in both samples.

    Raises:
        ValueError: for empty samples or shapes that differ.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> float(gk.divergence.energy_distance(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]])))
        10.0

    Source: Szekely and Rizzo, "Energy Statistics: A Class of Statistics Based on Distances", Journal of Statistical
    Planning and Inference 2013, equation 6.1.
    """
    return _energy_distance(*as_samples(x=x, y=y))


@jax.jit
def _energy_distance(x: Float[Array, " n d"], y: Float[Array, " m d"]) -> Float[Array, ""]:
    scale = common_scale(x, y)
    x = x / scale
    y = y / scale
    return scale * (2 * mean_pairs(root, x, y) - mean_pairs(root, x, x) - mean_pairs(root, y, y))


def mmd(
    x: Shaped[ArrayLike, " n *shape"], y: Shaped[ArrayLike, " m *shape"], *, bandwidth: Real[ArrayLike, ""]
) -> Float[Array, ""]:
    r"""Squared maximum mean discrepancy with the kernel $k(x, y) = e^{-|x - y|^2 / 2 b^2}$.

    $E\,k(X, X') + E\,k(Y, Y') - 2 E\,k(X, Y)$, means over all pairs, a point and itself included (V-statistic).
    Cost and memory are those of `energy_distance`.

    Args:
        x: first sample `(n, *shape)`.
        y: second sample `(m, *shape)`.
        bandwidth: width `b` of the kernel, positive, in the units of the data.

    Returns:
        The squared discrepancy, a scalar, not negative; differentiable in both samples.

    Raises:
        ValueError: for empty samples, shapes that differ, a bandwidth that is not positive.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> round(float(gk.divergence.mmd(jnp.zeros((1, 1)), jnp.ones((1, 1)), bandwidth=1.0)), 4)
        0.7869

    Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 5.
    """
    check_positive("bandwidth", bandwidth)
    x, y = as_samples(x=x, y=y)
    return _mmd(x, y, jnp.asarray(bandwidth, x.dtype))


@jax.jit
def _mmd(x: Float[Array, " n d"], y: Float[Array, " m d"], width: Float[Array, ""]) -> Float[Array, ""]:
    scale = common_scale(x, y)
    x = x / scale
    y = y / scale
    # Beyond 1e18 widths the kernel is zero anyway; the square of a larger ratio would overflow.
    ratio = jnp.minimum(scale / width, 1e18)

    def kernel(squares: Float[Array, " m"]) -> Float[Array, " m"]:
        return jnp.exp(-0.5 * squares * ratio**2)

    return mean_pairs(kernel, x, x) + mean_pairs(kernel, y, y) - 2 * mean_pairs(kernel, x, y)


def cauchy_schwarz(
    x: Shaped[ArrayLike, " n *shape"], y: Shaped[ArrayLike, " m *shape"], bandwidth: Real[ArrayLike, ""]
) -> Float[Array, ""]:
    r"""Cauchy-Schwarz divergence of the kernel density estimates of two samples.

    $$-2 \log\!\int\! p q + \log\!\int\! p^2 + \log\!\int\! q^2,$$

    with $p$ and $q$ the averages of Gaussians of standard deviation `bandwidth` about the points of `x` and `y`; the
    integrals are exact means over all pairs, taken through logarithms so that far samples do not underflow. Cost and
    memory are those of `energy_distance`.

    Args:
        x: first sample `(n, *shape)`.
        y: second sample `(m, *shape)`.
        bandwidth: standard deviation of the kernels, positive, in the units of the data.

    Returns:
        The divergence, a scalar, not negative; differentiable in both samples.

    Raises:
        ValueError: for empty samples, shapes that differ, a bandwidth that is not positive.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> float(gk.divergence.cauchy_schwarz(jnp.zeros((1, 1)), jnp.ones((1, 1)) * 2, 1.0))
        2.0

    Source: Principe, "Information Theoretic Learning", Springer 2010, section 2.5.
    """
    check_positive("bandwidth", bandwidth)
    x, y = as_samples(x=x, y=y)
    return _cauchy_schwarz(x, y, jnp.asarray(bandwidth, x.dtype))


@jax.jit
def _cauchy_schwarz(x: Float[Array, " n d"], y: Float[Array, " m d"], width: Float[Array, ""]) -> Float[Array, ""]:
    scale = common_scale(x, y)
    x = x / scale
    y = y / scale
    # The product of two kernels has twice the variance of one. A ratio too large for its dtype is held finite, so that
    # a point and itself are at distance zero and not NaN.
    ratio = jnp.minimum(0.5 * scale / width, jnp.finfo(x.dtype).max)
    return _log_overlap(x, x, ratio) + _log_overlap(y, y, ratio) - 2 * _log_overlap(x, y, ratio)


def _log_overlap(x: Float[Array, " n d"], y: Float[Array, " m d"], ratio: Float[Array, ""]) -> Float[Array, ""]:
    """Logarithm of the mean over all pairs of `exp(-(ratio * distance)^2)`."""

    def row(squares: Float[Array, " m"], i: Array) -> Float[Array, ""]:
        # Twice the product, not the square of the ratio: that may overflow where the product does not.
        return _log_mean_exp(-ratio * (ratio * squares))

    return _log_mean_exp(map_squares(row, x, y))


def _log_mean_exp(values: Float[Array, " n"]) -> Float[Array, ""]:
    """Logarithm of the mean of exponentials; minus infinity where all of them are."""
    top = jnp.max(values)
    top = jnp.where(jnp.isfinite(top), top, 0)
    return top + jnp.log(jnp.mean(jnp.exp(values - top)))
