"""Exact second moments of fractional Brownian motion of both kinds and of its increments."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genkit._core._checks import check, check_choice, check_count, check_interval
from genkit._core._known import float_dtype, is_known
from genkit.noise._quadrature import tanh_sinh


KINDS = ("I", "II")

# Nodes and span of the one integrand of kind II, singular at 0 like a power above -1/2.
_NODES = (161, 5.2)
_SMALLEST_NODE = 1e-36


def _nodes(dtype: np.dtype) -> tuple[Array, Array]:
    """Logarithms of the nodes, and the weights."""
    rule = tanh_sinh(*_NODES)
    log_node = rule.log_node
    weight = np.exp(rule.log_weight)
    if dtype == jnp.float32:
        # Smaller nodes underflow in float32, where their weight is below rounding anyway.
        keep = log_node > np.log(_SMALLEST_NODE)
        log_node = log_node[keep]
        weight = weight[keep]
    return jnp.asarray(log_node, dtype), jnp.asarray(weight, dtype)


def _power(base: Array, exponent: Array) -> Array:
    """`base ** exponent` for base >= 0, with 0 ** exponent = 0 and finite gradients there."""
    safe = jnp.where(base > 0, base, 1.0)
    return jnp.where(base > 0, jnp.exp(exponent * jnp.log(safe)), 0.0)


def valid_index(hurst: Array) -> Array:
    """The index, or NaN where it is outside (0, 1) and known only at run time, when nothing can be refused."""
    if is_known(hurst):
        return hurst
    return jnp.where((hurst > 0) & (hurst < 1), hurst, jnp.nan)


def as_floats(*values: ArrayLike) -> tuple[Array, ...]:
    """The values in one floating dtype and one shape."""
    dtype = float_dtype(*values)
    arrays = [jnp.asarray(v, dtype) for v in values]
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    return tuple(jnp.broadcast_to(a, shape) for a in arrays)


def check_pair(hurst: ArrayLike, s: ArrayLike, t: ArrayLike, kind: str) -> None:
    """Refuse an index outside (0, 1), negative times and unknown kinds."""
    check_choice("kind", kind, KINDS)
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check_interval("s", s, 0)
    check_interval("t", t, 0)


def fbm_covariance(hurst: ArrayLike, s: ArrayLike, t: ArrayLike, kind: str = "I") -> Float[Array, " *shape"]:
    r"""Covariance of unit-variance fractional Brownian motion, elementwise over broadcast arguments.

    Kind I (Mandelbrot-Van Ness, stationary increments) has $\tfrac12(s^{2H}+t^{2H}-|t-s|^{2H})$. Kind II
    (Riemann-Liouville, started at 0 with no past) has $2H\int_0^{s\wedge t}(s-u)^{H-1/2}(t-u)^{H-1/2}du$, computed by
    doubly exponential quadrature. Both have variance $t^{2H}$.

    Args:
        hurst: Hurst index $H$ in (0, 1).
        s: first time, non-negative; `ts[:, None]` with `t=ts[None, :]` gives a matrix.
        t: second time, non-negative.
        kind: "I" or "II".

    Returns:
        The covariance, of the broadcast shape of the arguments.

    Raises:
        ValueError: if `hurst` is outside (0, 1), a time is negative or `kind` is unknown.

    Example:
        >>> import genkit.noise as gn
        >>> float(gn.fbm_covariance(0.7, 2.0, 2.0))  # 2 ** 1.4
        2.6390...

    Source: Mandelbrot and Van Ness, "Fractional Brownian motions, fractional noises and applications", 1968;
    Marinucci and Robinson, "Alternative forms of fractional Brownian motion", 1999.
    """
    check_pair(hurst, s, t, kind)
    h, s, t = as_floats(hurst, s, t)
    h = valid_index(h)
    if kind == "I":
        return (_power(s, 2 * h) + _power(t, 2 * h) - _power(jnp.abs(t - s), 2 * h)) / 2
    return _kind_two(h, jnp.minimum(s, t), jnp.abs(t - s))


def _kind_two(h: Array, lo: Array, gap: Array) -> Array:
    """Kind II covariance at times lo and lo + gap; the diagonal is known and is the one case quadrature finds hard."""
    log_v, weight = _nodes(h.dtype)
    v = jnp.exp(log_v)
    a = (h - 0.5)[..., None]
    ratio = jnp.where(gap > 0, gap, lo) / jnp.where(lo > 0, lo, 1.0)
    integrand = jnp.exp(a * (log_v + jnp.log(ratio[..., None] + v)))
    off_diagonal = 2 * h * _power(lo, 2 * h) * (integrand @ weight)
    return jnp.where(gap > 0, off_diagonal, _power(lo, 2 * h))


def fgn_autocovariance(hurst: ArrayLike, num: int) -> Float[Array, " num"]:
    r"""Autocovariance $r_k=\tfrac12(|k+1|^{2H}-2k^{2H}+|k-1|^{2H})$ of unit-step fractional Gaussian noise.

    Args:
        hurst: Hurst index in (0, 1), a scalar.
        num: number of lags.

    Returns:
        The autocovariances, shape (num,); multiply by `step ** (2 * hurst)` for another step.

    Raises:
        ValueError: if `hurst` is outside (0, 1) or no scalar, or `num` is not a positive integer.

    Example:
        >>> from genkit.noise import fgn_autocovariance
        >>> [round(float(r), 3) for r in fgn_autocovariance(0.7, 3)]
        [1.0, 0.32, 0.189]
    """
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check(jnp.ndim(hurst) == 0, "hurst", "a scalar", hurst, "Use jax.vmap for several.")
    check_count("num", num)
    h = valid_index(jnp.asarray(hurst, float_dtype(hurst)))
    k = jnp.arange(num, dtype=h.dtype)
    direct = (_power(k + 1, 2 * h) - 2 * _power(k, 2 * h) + _power(jnp.abs(k - 1), 2 * h)) / 2
    # The difference loses k digits-squared for long lags: there the binomial series in 1 / k^2 is used instead.
    far = jnp.maximum(k, 8.0)
    term = jnp.ones_like(k)
    series = jnp.zeros_like(k)
    for m in range(1, 10):
        term = term * (2 * h - 2 * m + 2) * (2 * h - 2 * m + 1) / ((2 * m - 1) * (2 * m)) / far**2
        series = series + term
    return jnp.where(k < 8, direct, _power(far, 2 * h) * series)
