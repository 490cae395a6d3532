r"""Logarithms of modified Bessel functions, for orders from 0 to tens of thousands.

Everything rests on one ratio and one sum without cancellation. With $r_v = I_{v+1}(x) / I_v(x)$ and $z = x / v$:

1. At large order, Debye's uniform expansion gives $r_v$ for every $x$ at once.
2. The recurrence $r_{k-1} = x / (2k + x r_k)$ runs down to any order; it forgets errors on the way.
3. $\log {}_0F_1(v+1; x^2/4) = \sum_k \log(1 + x r_k / 2k)$ over the orders passed, so that
   $\log I_v = v \log(x/2) - \log \Gamma(v+1) + \log {}_0F_1$ has positive terms only and keeps its digits as x -> 0.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, logsumexp
from jaxtyping import Array, ArrayLike, Float
from numpy.polynomial import Polynomial

from genkit._core._checks import check
from genkit._core._known import on_host


# Orders below this one are reached by the recurrence. 13 terms of Debye's expansion at order 32 leave less than 1e-16.
_DEBYE_ORDER = 32
_DEBYE_TERMS = 13
# exp(-60) is below the precision of float64 beside the largest node of the integral for K.
_TAIL = 60.0
_NODES = 256


@functools.cache
def _debye_coefficients() -> tuple[np.ndarray, np.ndarray]:
    r"""Coefficients in $u_k(p) = p^k \sum_j a_{kj} p^{2j}$, k >= 1, and in $\frac12 u_{k-1} + p u_{k-1}'$."""
    p = Polynomial([0.0, 1.0])
    u = [Polynomial([1.0])]
    for _ in range(_DEBYE_TERMS):
        last = u[-1]
        u.append(0.5 * p**2 * (1 - p**2) * last.deriv() + 0.125 * ((1 - 5 * p**2) * last).integ())
    values = np.zeros((_DEBYE_TERMS, _DEBYE_TERMS + 1))
    slopes = np.zeros((_DEBYE_TERMS, _DEBYE_TERMS + 1))
    for k in range(_DEBYE_TERMS):
        values[k, : k + 2] = u[k + 1].coef[k + 1 :: 2]
        slopes[k, : k + 1] = (0.5 * u[k] + p * u[k].deriv()).coef[k::2]
    return values, slopes


def _series(
    coefficients: np.ndarray, order: Float[Array, "..."], p: Float[Array, "..."], sign: float = 1.0
) -> Float[Array, "..."]:
    r"""Sum over k >= 1 of $(\pm p / v)^k \sum_j a_{kj} p^{2j}$."""
    # One matrix product for all terms: written out, they are thousands of operations to compile.
    even = jnp.square(p)[..., None] ** np.arange(_DEBYE_TERMS + 1)
    powers = (sign * p / order)[..., None] ** np.arange(1, _DEBYE_TERMS + 1)
    return jnp.sum(powers * (even @ jnp.asarray(coefficients.T, p.dtype)), axis=-1)


@jax.custom_jvp
def _half_angle(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """Z / (1 + sqrt(1 + z^2)), with a derivative that does not cancel at large z."""
    return z / (1 + jnp.hypot(1.0, z))


@_half_angle.defjvp
def _half_angle_jvp(primals: tuple, tangents: tuple) -> tuple:
    (z,) = primals
    (dz,) = tangents
    s = jnp.hypot(1.0, z)
    return _half_angle(z), dz / (s * (1 + s))


def _debye_sum(order: Float[Array, "..."], p: Float[Array, "..."], sign: float = 1.0) -> Float[Array, "..."]:
    """Sum over k >= 1 of sign^k u_k(p) / order^k."""
    values, _ = _debye_coefficients()
    return _series(values, order, p, sign)


def _debye_ratio(order: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """I_{v+1}(x) / I_v(x) at an order of at least 32."""
    _, slopes = _debye_coefficients()
    z = x / order
    p = 1 / jnp.hypot(1.0, z)
    # Member k of `slopes` belongs to u_{k-1}, which is of parity k - 1: one power of p too many above.
    correction = _series(slopes, order, p) / p
    return _half_angle(z) - z * p**2 * correction / (1 + _debye_sum(order, p))


def _debye_log_0f1(order: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Log 0F1(order + 1; x^2 / 4) at an order of at least 32: Debye's expansion relative to its limit at x = 0."""
    z = x / order
    s = jnp.hypot(1.0, z)
    excess = z * _half_angle(z)  # s - 1 without cancellation
    one = jnp.ones_like(s)
    main = order * (excess - jnp.log1p(excess / 2)) - 0.5 * jnp.log(s)
    return main + jnp.log1p(_debye_sum(order, 1 / s)) - jnp.log1p(_debye_sum(order, one))


def _descend(order: Float[Array, "..."], x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Ratio and log 0F1 at `order`, from the order 32 higher."""

    def down(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        ratio, log_0f1 = state
        k = order + (_DEBYE_ORDER - step)
        half = x * ratio / (2 * k)
        return x / (2 * k) / (1 + half), log_0f1 + jnp.log1p(half)

    top = order + _DEBYE_ORDER
    return jax.lax.fori_loop(0, _DEBYE_ORDER, down, (_debye_ratio(top, x), _debye_log_0f1(top, x)))


def _ratio_and_log_0f1(order: Float[Array, "..."], x: Float[Array, "..."]) -> tuple[Array, Array]:
    # Each branch sees arguments of its own range only, so that neither spoils the other's gradient.
    large = order >= _DEBYE_ORDER
    high = jnp.where(large, order, _DEBYE_ORDER)
    low_ratio, low_log = _descend(jnp.where(large, 0.0, order), x)
    ratio = jnp.where(large, _debye_ratio(high, x), low_ratio)
    log_0f1 = jnp.where(large, _debye_log_0f1(high, x), low_log)
    return ratio, log_0f1


@jax.custom_jvp
def log_0f1(order: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Logarithm of ${}_0F_1(v + 1; x^2/4) = \Gamma(v+1) (2/x)^v I_v(x)$, zero at x = 0.

    Args:
        order: v, at least 0.
        x: argument, at least 0.

    Returns:
        An array of the broadcast shape.
    """
    return _ratio_and_log_0f1(order, x)[1]


@log_0f1.defjvp
def _log_0f1_jvp(primals: tuple, tangents: tuple) -> tuple:
    # The derivative in x is the ratio: exact, where differentiating the sum would cancel at large x.
    order, x = primals
    d_order, dx = tangents
    ratio, value = _ratio_and_log_0f1(order, x)
    _, by_order = jax.jvp(lambda v: _ratio_and_log_0f1(v, x)[1], (order,), (d_order,))
    return value, ratio * dx + by_order


def _arguments(order: ArrayLike, x: ArrayLike) -> tuple[Array, Array]:
    """Both arguments as floating arrays of the broadcast shape, refused where known to lie outside the domain."""
    order = jnp.asarray(order)
    x = jnp.asarray(x)
    dtype = jnp.result_type(order, x)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    for name, value in (("order", order), ("x", x)):
        known = on_host(value)
        if known is not None:
            check(bool(np.all(known >= 0)), name, "numbers of at least 0", value)
    shape = jnp.broadcast_shapes(order.shape, x.shape)
    return jnp.broadcast_to(order, shape).astype(dtype), jnp.broadcast_to(x, shape).astype(dtype)


def log_bessel_i(order: ArrayLike, x: ArrayLike) -> Float[Array, "..."]:
    r"""Logarithm of the modified Bessel function of the first kind, $\log I_v(x)$.

    Differentiable in both arguments; the derivative in x is $v/x + I_{v+1}(x)/I_v(x)$, evaluated without cancellation.

    Args:
        order: v, real and at least 0; any shape.
        x: argument, at least 0; any shape that broadcasts with `order`.

    Returns:
        An array of the broadcast shape; -inf at x = 0 for positive orders.

    Raises:
        ValueError: if a known argument is negative or NaN.

    Example:
        >>> import genkit as gk
        >>> round(float(gk.distributions.log_bessel_i(0.0, 1.0)), 4)
        0.2359

    Source: Debye's uniform expansion and the recurrence of ratios, DLMF 10.41 and 10.29.
    """
    order, x = _arguments(order, x)
    # 0 * log(0) is 0 here: I_0(0) = 1.
    power = jnp.where(order > 0, order * jnp.log(jnp.where(order > 0, x, 1.0) / 2), 0.0)
    return power - gammaln(order + 1) + log_0f1(order, x)


def bessel_ratio(order: ArrayLike, x: ArrayLike) -> Float[Array, "..."]:
    r"""Ratio of modified Bessel functions of neighboring orders, $I_{v+1}(x) / I_v(x)$, between 0 and 1.

    With $v = d/2 - 1$ it is the length of the mean of a von Mises-Fisher distribution in $d$ dimensions.

    Args:
        order: v, real and at least 0; any shape.
        x: argument, at least 0; any shape that broadcasts with `order`.

    Returns:
        An array of the broadcast shape.

    Raises:
        ValueError: if a known argument is negative or NaN.

    Example:
        >>> import genkit as gk
        >>> round(float(gk.distributions.bessel_ratio(0.5, 10.0)), 4)  # coth(10) - 1/10
        0.9

    Source: Amos (1974), Computation of modified Bessel functions and their ratios.
    """
    return _ratio_and_log_0f1(*_arguments(order, x))[0]


def _integral_k(order: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Log K_v by trapezoids on $\int_0^\infty \exp(-x \cosh t) \cosh(v t) dt$, which converge geometrically."""
    end = jnp.ones_like(x)
    for _ in range(4):  # where the integrand has fallen by exp(-_TAIL)
        end = jnp.arccosh(1 + (_TAIL + order * end) / x)
    end = jax.lax.stop_gradient(end)[..., None]
    t = end * jnp.linspace(0.0, 1.0, _NODES, dtype=x.dtype)
    v = order[..., None]
    # cosh(t) - 1 = 2 sinh(t/2)^2 keeps the digits of large x; log cosh(vt) = vt + log1p(exp(-2vt)) - log 2 those of vt.
    exponent = -2 * x[..., None] * jnp.sinh(t / 2) ** 2 + v * t + jnp.log1p(jnp.exp(-2 * v * t)) - jnp.log(2.0)
    weights = jnp.ones(_NODES, x.dtype).at[jnp.array([0, -1])].set(0.5)
    return logsumexp(exponent, axis=-1, b=weights) + jnp.log(end[..., 0] / (_NODES - 1)) - x


def log_bessel_k(order: ArrayLike, x: ArrayLike) -> Float[Array, "..."]:
    r"""Logarithm of the modified Bessel function of the second kind, $\log K_v(x)$.

    Differentiable in both arguments. Orders below 32 take a quadrature of 256 nodes an entry, higher ones 13 terms.

    Args:
        order: v, real and at least 0; any shape.
        x: argument, positive; any shape that broadcasts with `order`.

    Returns:
        An array of the broadcast shape; inf at x = 0.

    Raises:
        ValueError: if a known argument is negative or NaN.

    Example:
        >>> import genkit as gk
        >>> round(float(gk.distributions.log_bessel_k(0.5, 2.0)), 4)  # log sqrt(pi / 4) - 2
        -2.1208

    Source: DLMF 10.32.9 (integral) and 10.41.4 (Debye).
    """
    order, x = _arguments(order, x)
    positive = jnp.where(x > 0, x, 1.0)
    large = order >= _DEBYE_ORDER
    high = jnp.where(large, order, _DEBYE_ORDER)
    z = positive / high
    s = jnp.hypot(1.0, z)
    eta = s + jnp.log(_half_angle(z))
    debye = 0.5 * jnp.log(jnp.pi / (2 * high)) - high * eta - 0.5 * jnp.log(s)
    debye += jnp.log1p(_debye_sum(high, 1 / s, -1.0))
    value = jnp.where(large, debye, _integral_k(jnp.where(large, 0.0, order), positive))
    return jnp.where(x > 0, value, jnp.inf)
