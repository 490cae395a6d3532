"""Exact likelihood of fractional Gaussian noise in O(n^2) by Levinson's recursion."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from genkit._core._checks import check, check_finite, check_interval, check_positive
from genkit._core._known import float_dtype
from genkit.noise._covariance import fgn_autocovariance


# Series whose every state is kept for gradients: a megabyte, and no step is repeated.
_SHORT = 512


class LevinsonState(NamedTuple):
    """Best linear predictor from the past: its coefficients, the same backwards, and its error variance."""

    # forward[j] multiplies the value j + 1 steps ago.
    forward: Array
    # The same coefficients in reversed order, padded with zeros.
    backward: Array
    variance: Array


def levinson_start(autocovariance: Array) -> LevinsonState:
    """The predictor of the first value: nothing."""
    zeros = jnp.zeros(autocovariance.shape[0] - 1, autocovariance.dtype)
    return LevinsonState(zeros, zeros, autocovariance[0])


def levinson_step(state: LevinsonState, k: Array, autocovariance: Array) -> LevinsonState:
    """From the predictor that uses k - 1 past values to the one that uses k (k >= 1)."""
    lags = autocovariance[1:]
    reflection = (autocovariance[k] - jnp.sum(state.backward * lags)) / state.variance
    return levinson_update(state, k, reflection)


def levinson_update(state: LevinsonState, k: Array, reflection: Array) -> LevinsonState:
    """The same with the partial autocorrelation at lag k known."""
    forward = (state.forward - reflection * state.backward).at[k - 1].set(reflection)
    shifted = jnp.roll(state.backward - reflection * state.forward, 1)
    backward = shifted.at[0].set(reflection)
    keep = jnp.arange(forward.shape[0]) < k
    variance = state.variance * (1 - reflection**2)
    return LevinsonState(jnp.where(keep, forward, 0.0), jnp.where(keep, backward, 0.0), variance)


def fgn_whiten(increments: Float[ArrayLike, " n"], hurst: ArrayLike) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Whiten a series as if it were unit-variance, unit-step fractional Gaussian noise.

    Args:
        increments: the series, shape (n,).
        hurst: Hurst index in (0, 1), a scalar; differentiable.

    Returns:
        The standardized one-step prediction errors, shape (n,), and the log-determinant of the covariance. A mean is
        fitted by whitening a column of ones alike (generalized least squares).

    Raises:
        ValueError: if `hurst` is outside (0, 1) or no scalar, or the series is not one-dimensional.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit.noise import fgn_whiten
        >>> white, log_det = fgn_whiten(jnp.array([1.0, -1.0]), 0.5)
        >>> [float(w) for w in white], float(log_det)
        ([1.0, -1.0], 0.0)

    Source: Brockwell and Davis, "Time Series: Theory and Methods", section 5.2 (Durbin-Levinson).
    """
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check_finite("increments", increments)
    x = jnp.asarray(increments, float_dtype(increments))
    check(x.ndim == 1 and x.shape[0] >= 1, "increments", "a series of shape (n,)", f"shape {x.shape}")
    n = x.shape[0]
    r = fgn_autocovariance(hurst, n).astype(x.dtype)
    if n == 1:
        return x, jnp.zeros((), x.dtype)

    def body(carry: tuple[LevinsonState, Array], k: Array) -> tuple[tuple[LevinsonState, Array], tuple[Array, Array]]:
        state, past = carry
        state, past, error = _predict(state, past, k, x, r)
        return (state, past), (error / jnp.sqrt(state.variance), jnp.log(state.variance))

    _, (white, log_var) = _scan_in_blocks(body, (levinson_start(r), _first_past(x)), jnp.arange(1, n))
    return jnp.concatenate([x[:1], white]), jnp.sum(log_var)


def _first_past(x: Array) -> Array:
    """The values seen before the second one: entry j is the value j + 1 steps ago."""
    return jnp.zeros(x.shape[0] - 1, x.dtype).at[0].set(x[0])


def _predict(state: LevinsonState, past: Array, k: Array, x: Array, r: Array) -> tuple[LevinsonState, Array, Array]:
    """One step of the recursion: the next predictor, the values seen after it, and the error of its prediction."""
    state = levinson_step(state, k, r)
    error = x[k] - jnp.sum(state.forward * past)
    past = jnp.roll(past, 1).at[0].set(x[k])
    return state, past, error


def _scan_in_blocks(body: Callable, carry: PyTree, xs: Array) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`, with gradients that keep the state only between blocks of about the root.

    The state is as long as the series: kept at every step, 20,000 values would take 10 GB.
    """
    num = xs.shape[0]
    if num <= _SHORT:
        return jax.lax.scan(body, carry, xs)
    size = round(num**0.5)
    whole = num - num % size

    @jax.checkpoint
    def block(carry: PyTree, xs: Array) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(body, carry, xs)

    carry, outputs = jax.lax.scan(block, carry, xs[:whole].reshape(-1, size))
    outputs = jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:]), outputs)
    if whole == num:
        return carry, outputs
    carry, rest = block(carry, xs[whole:])
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, rest)


class _Solved(NamedTuple):
    """A Toeplitz system solved: log-density, solution for the series, and the sums along diagonals of the inverse."""

    log_density: Array
    solution: Array
    diagonal_sums: Array


@jax.custom_jvp
def _log_density(x: Array, r: Array) -> Array:
    r"""Log-density of a series under the zero-mean normal distribution of an autocovariance.

    Its derivative follows from one solve, $d\log p = -\alpha' dx + \frac12(\alpha' dR\,\alpha - tr(R^{-1} dR))$ with
    $\alpha = R^{-1} x$. Gradients through the recursion would keep, or repeat, each of its n states of length n.
    """

    def body(carry: tuple[LevinsonState, Array], k: Array) -> tuple[tuple[LevinsonState, Array], Array]:
        state, past = carry
        state, past, error = _predict(state, past, k, x, r)
        return (state, past), _surprise(error, state.variance)

    _, rest = _scan_in_blocks(body, (levinson_start(r), _first_past(x)), jnp.arange(1, x.shape[0]))
    return -_surprise(x[0], r[0]) - jnp.sum(rest)


@_log_density.defjvp
def _log_density_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, r = primals
    solved = _solve(x, r)
    # Every diagonal but the main one occurs twice.
    share = jnp.ones_like(r).at[0].set(0.5)
    slope = share * (_lagged_products(solved.solution, solved.solution) - solved.diagonal_sums)
    return solved.log_density, slope @ tangents[1] - solved.solution @ tangents[0]


def _surprise(error: Array, variance: Array) -> Array:
    """Minus the logarithm of the normal density of one prediction error."""
    return 0.5 * (error**2 / variance + jnp.log(2 * jnp.pi * variance))


def _solve(x: Array, r: Array) -> _Solved:
    """Levinson's recursion with everything that derivatives need."""
    n = x.shape[0]
    places = jnp.arange(n)

    def body(carry: tuple[LevinsonState, Array, Array], k: Array) -> tuple[tuple[LevinsonState, Array, Array], Array]:
        state, past, solution = carry
        state, past, error = _predict(state, past, k, x, r)
        # The residual filter of the next value is, up to its variance, a column of the inverse.
        column = jnp.where(places == k, 1.0, -jnp.append(state.backward, 0.0))
        solution = solution + error / state.variance * column
        return (state, past, solution), _surprise(error, state.variance)

    solution = jnp.zeros_like(x).at[0].set(x[0] / r[0])
    carry = (levinson_start(r), _first_past(x), solution)
    (state, _, solution), rest = _scan_in_blocks(body, carry, places[1:])
    # Gohberg and Semencul: the inverse is a difference of products of triangular Toeplitz matrices of this filter.
    residual_filter = jnp.concatenate([jnp.ones(1, x.dtype), -state.forward])
    remaining = (n - places) * _lagged_products(residual_filter, residual_filter)
    sums = (remaining - 2 * _lagged_products(places * residual_filter, residual_filter)) / state.variance
    return _Solved(-_surprise(x[0], r[0]) - jnp.sum(rest), solution, sums)


def _lagged_products(a: Array, b: Array) -> Array:
    """For every lag k the sum over i of a[i] b[i + k]."""
    n = a.shape[0]
    # Twice the length, so that the circle of the transform does not close.
    product = jnp.conj(jnp.fft.rfft(a, 2 * n)) * jnp.fft.rfft(b, 2 * n)
    return jnp.fft.irfft(product, 2 * n)[:n]


def fgn_log_prob(
    increments: Float[ArrayLike, " n"], hurst: ArrayLike, *, scale: ArrayLike = 1.0, mean: ArrayLike = 0.0
) -> Float[Array, ""]:
    r"""Exact log-density of fractional Gaussian noise, $x\sim N(\text{mean},\text{scale}^2R(H))$.

    Args:
        increments: the series, shape (n,), at unit steps.
        hurst: Hurst index in (0, 1), a scalar; differentiable.
        scale: standard deviation of one increment, positive.
        mean: mean of one increment.

    Returns:
        The log-density, a scalar, in O(n^2). Its gradient takes one more such recursion and O(n) memory.

    Raises:
        ValueError: if `hurst` is outside (0, 1) or no scalar, or the series is not one-dimensional.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit.noise import fgn_log_prob
        >>> float(fgn_log_prob(jnp.zeros(2), 0.5))  # two independent standard normals at 0
        -1.837877...

    Source: Levinson's recursion as in `fgn_whiten`; its gradient by Gohberg and Semencul, "On the inversion of finite
    Toeplitz matrices and their continuous analogs", 1972.
    """
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check_finite("increments", increments)
    check_finite("mean", mean)
    check_positive("scale", scale)
    check_finite("scale", scale)
    dtype = float_dtype(increments)
    mean = jnp.asarray(mean, dtype)
    scale = jnp.asarray(scale, dtype)
    x = (jnp.asarray(increments, dtype) - mean) / scale
    check(x.ndim == 1 and x.shape[0] >= 1, "increments", "a series of shape (n,)", f"shape {x.shape}")
    n = x.shape[0]
    r = fgn_autocovariance(hurst, n).astype(x.dtype)
    if n == 1:
        return -_surprise(x[0], r[0]) - jnp.log(scale)
    return _log_density(x, r) - n * jnp.log(scale)
