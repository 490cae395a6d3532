"""Distances between samples from sums over pairs: energy distance, MMD, Cauchy-Schwarz."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from genkit._core._checks import check_positive

from ._pairs import as_samples, map_rows, mean_pairs, root, squares


def energy_distance(x: Inexact[ArrayLike, " n *shape"], y: Inexact[ArrayLike, " m *shape"]) -> Float[Array, ""]:
    r"""Energy distance of two samples, $2 E|X - Y| - E|X - X'| - E|Y - Y'|$.

    Expectations are means over all pairs, a point and itself included (V-statistic): never negative, zero for equal
    samples only, and biased upwards by about $E|X - X'|/n + E|Y - Y'|/m$.

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
    x, y = as_samples(x=x, y=y)
    return 2 * mean_pairs(root, x, y) - mean_pairs(root, x, x) - mean_pairs(root, y, y)


def mmd(
    x: Inexact[ArrayLike, " n *shape"], y: Inexact[ArrayLike, " m *shape"], *, bandwidth: Float[ArrayLike, ""]
) -> Float[Array, ""]:
    r"""Squared maximum mean discrepancy with the kernel $k(x, y) = e^{-|x - y|^2 / 2 b^2}$.

    $E\,k(X, X') + E\,k(Y, Y') - 2 E\,k(X, Y)$, means over all pairs, a point and itself included (V-statistic).

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
    width = jnp.asarray(bandwidth, x.dtype)
    within = mean_pairs(_gaussian, x, x, width) + mean_pairs(_gaussian, y, y, width)
    return within - 2 * mean_pairs(_gaussian, x, y, width)


def cauchy_schwarz(
    x: Inexact[ArrayLike, " n *shape"], y: Inexact[ArrayLike, " m *shape"], bandwidth: Float[ArrayLike, ""]
) -> Float[Array, ""]:
    r"""Cauchy-Schwarz divergence of the kernel density estimates of two samples.

    $$-2 \log\!\int\! p q + \log\!\int\! p^2 + \log\!\int\! q^2,$$

    with $p$ and $q$ the averages of Gaussians of standard deviation `bandwidth` about the points of `x` and `y`; the
    integrals are exact means over all pairs, taken through logarithms so that far samples do not underflow.

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
    scale = 4 * jnp.asarray(bandwidth, x.dtype) ** 2  # the product of two kernels has twice the variance of one
    return _log_overlap(x, x, scale) + _log_overlap(y, y, scale) - 2 * _log_overlap(x, y, scale)


def _gaussian(square: Float[Array, " n"], width: Float[Array, ""]) -> Float[Array, " n"]:
    """The Gaussian kernel of a squared distance."""
    return jnp.exp(-0.5 * square / width**2)


@jax.jit
def _log_overlap(x: Float[Array, " n d"], y: Float[Array, " m d"], scale: Float[Array, ""]) -> Float[Array, ""]:
    """Logarithm of the mean over all pairs of `exp(-squared distance / scale)`."""
    return _log_mean_exp(map_rows(lambda row: _log_mean_exp(-squares(row, y) / scale), x, y))


def _log_mean_exp(values: Float[Array, " n"]) -> Float[Array, ""]:
    """Logarithm of the mean of exponentials."""
    top = jnp.max(values)
    return top + jnp.log(jnp.mean(jnp.exp(values - top)))
