"""Exact likelihood of fractional Gaussian noise in O(n^2) by Levinson's recursion."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from genkit._core._checks import check, check_interval
from genkit._core._known import float_dtype
from genkit.noise._covariance import fgn_autocovariance


_SHORT = 512  # series whose every state is kept for gradients: a megabyte, and no step is repeated


class LevinsonState(NamedTuple):
    """Best linear predictor from the past: its coefficients, the same backwards, and its error variance."""

    forward: Array  # forward[j] multiplies the value j + 1 steps ago
    backward: Array  # the same coefficients in reversed order, padded with zeros
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
    x = jnp.asarray(increments, float_dtype(increments))
    check(x.ndim == 1 and x.shape[0] >= 1, "increments", "a series of shape (n,)", f"shape {x.shape}")
    n = x.shape[0]
    r = fgn_autocovariance(hurst, n).astype(x.dtype)
    if n == 1:
        return x, jnp.zeros((), x.dtype)

    def body(carry: tuple[LevinsonState, Array], k: Array) -> tuple[tuple[LevinsonState, Array], tuple[Array, Array]]:
        state, past = carry  # past[j] is the value j + 1 steps ago
        state = levinson_step(state, k, r)
        error = x[k] - jnp.sum(state.forward * past)
        past = jnp.roll(past, 1).at[0].set(x[k])
        return (state, past), (error / jnp.sqrt(state.variance), jnp.log(state.variance))

    past = jnp.zeros(n - 1, x.dtype).at[0].set(x[0])
    white, log_var = _scan_in_blocks(body, (levinson_start(r), past), jnp.arange(1, n))
    return jnp.concatenate([x[:1], white]), jnp.sum(log_var)


def _scan_in_blocks(body: Callable, carry: PyTree, xs: Array) -> PyTree:
    """The outputs of `jax.lax.scan`, with gradients that keep the state only between blocks of about the root.

    The state is as long as the series: kept at every step, 20,000 values would take 10 GB.
    """
    num = xs.shape[0]
    if num <= _SHORT:
        return jax.lax.scan(body, carry, xs)[1]
    size = round(num**0.5)
    whole = num - num % size

    @jax.checkpoint
    def block(carry: PyTree, xs: Array) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(body, carry, xs)

    carry, outputs = jax.lax.scan(block, carry, xs[:whole].reshape(-1, size))
    outputs = jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:]), outputs)
    if whole == num:
        return outputs
    _, rest = block(carry, xs[whole:])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, rest)


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
        The log-density, a scalar.

    Raises:
        ValueError: if `hurst` is outside (0, 1) or no scalar, or the series is not one-dimensional.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit.noise import fgn_log_prob
        >>> float(fgn_log_prob(jnp.zeros(2), 0.5))  # two independent standard normals at 0
        -1.837877...

    Source: Levinson's recursion as in `fgn_whiten`.
    """
    dtype = float_dtype(increments)
    mean = jnp.asarray(mean, dtype)
    scale = jnp.asarray(scale, dtype)
    white, log_det = fgn_whiten((jnp.asarray(increments, dtype) - mean) / scale, hurst)
    n = white.shape[0]
    return -0.5 * (jnp.sum(white**2) + log_det + n * jnp.log(2 * jnp.pi)) - n * jnp.log(scale)
