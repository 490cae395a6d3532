"""Exact second moments: fractional Brownian motion of both kinds, its increments, fractional Ornstein-Uhlenbeck."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genkit._core._checks import check_choice, check_count, check_interval, check_positive


KINDS = ("I", "II")


@functools.cache
def _tanh_sinh(num: int = 161, span: float = 5.2) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1) that resolve a power singularity at 0 (both ends are graded doubly exponentially)."""
    u, step = np.linspace(-span, span, num, retstep=True)
    z = np.pi * np.sinh(u)
    # log v, log (1 - v) computed apart, so that nodes as small as 1e-124 keep full relative precision
    log_v, log_rest = -np.logaddexp(0.0, -z), -np.logaddexp(0.0, z)
    return np.exp(log_v), step * np.pi * np.cosh(u) * np.exp(log_v + log_rest)


def _nodes(dtype: jnp.dtype) -> tuple[Array, Array]:
    v, w = _tanh_sinh()
    keep = v > 1e-36  # smaller nodes underflow in float32, where their weight is below rounding anyway
    if dtype == jnp.float32:
        v, w = v[keep], w[keep]
    return jnp.asarray(v, dtype), jnp.asarray(w, dtype)


def _power(base: Array, exponent: Array) -> Array:
    """`base ** exponent` for base >= 0, with 0 ** exponent = 0 and finite gradients there."""
    safe = jnp.where(base > 0, base, 1.0)
    return jnp.where(base > 0, jnp.exp(exponent * jnp.log(safe)), 0.0)


def _as_floats(*values: ArrayLike) -> tuple[Array, ...]:
    dtype = jnp.result_type(float, *(jnp.asarray(v) for v in values))
    return tuple(jnp.broadcast_arrays(*(jnp.asarray(v, dtype) for v in values)))


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
    check_choice("kind", kind, KINDS)
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check_interval("s", s, 0)
    check_interval("t", t, 0)
    h, s, t = _as_floats(hurst, s, t)
    if kind == "I":
        return (_power(s, 2 * h) + _power(t, 2 * h) - _power(jnp.abs(t - s), 2 * h)) / 2
    return _kind_two(h, jnp.minimum(s, t), jnp.abs(t - s))


def _kind_two(h: Array, lo: Array, gap: Array) -> Array:
    """Kind II covariance at times lo and lo + gap; the diagonal is known and is the one case quadrature finds hard."""
    v, w = _nodes(h.dtype)
    a = (h - 0.5)[..., None]
    ratio = jnp.where(gap > 0, gap, lo) / jnp.where(lo > 0, lo, 1.0)
    log_v = jnp.log(v)
    integrand = jnp.exp(a * (log_v + jnp.log(ratio[..., None] + v)))
    off_diagonal = 2 * h * _power(lo, 2 * h) * (integrand @ w)
    return jnp.where(gap > 0, off_diagonal, _power(lo, 2 * h))


def fgn_autocovariance(hurst: ArrayLike, num: int) -> Float[Array, " num"]:
    r"""Autocovariance $r_k=\tfrac12(|k+1|^{2H}-2k^{2H}+|k-1|^{2H})$ of unit-step fractional Gaussian noise.

    Args:
        hurst: Hurst index in (0, 1), a scalar.
        num: number of lags.

    Returns:
        The autocovariances, shape (num,); multiply by `step ** (2 * hurst)` for another step.

    Raises:
        ValueError: if `hurst` is outside (0, 1) or `num` is not a positive integer.

    Example:
        >>> from genkit.noise import fgn_autocovariance
        >>> [round(float(r), 3) for r in fgn_autocovariance(0.7, 3)]
        [1.0, 0.32, 0.189]
    """
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check_count("num", num)
    h = jnp.asarray(hurst, jnp.result_type(float, jnp.asarray(hurst)))
    k = jnp.arange(num, dtype=h.dtype)
    direct = (_power(k + 1, 2 * h) - 2 * _power(k, 2 * h) + _power(jnp.abs(k - 1), 2 * h)) / 2
    # The difference loses k digits-squared for long lags: there the binomial series in 1 / k^2 is used instead.
    far = jnp.maximum(k, 8.0)
    term, series = jnp.ones_like(k), jnp.zeros_like(k)
    for m in range(1, 10):
        term = term * (2 * h - 2 * m + 2) * (2 * h - 2 * m + 1) / ((2 * m - 1) * (2 * m)) / far**2
        series = series + term
    return jnp.where(k < 8, direct, _power(far, 2 * h) * series)


def _decays(h: Array, theta: Array, gap: Array, length: Array, power: Array) -> tuple[Array, Array]:
    r"""`J = int_0^gap e^{-theta (gap - r)} r^power dr`, `M = int_0^length e^{-theta w} (gap + w)^power dw`."""
    v, w = _nodes(h.dtype)
    p, g, n = power[..., None], gap[..., None], length[..., None]
    rate = theta[..., None]
    j = _power(gap, power + 1) * (jnp.exp(-rate * g * (1 - v) + p * jnp.log(v)) @ w)
    shifted = g + n * v
    m = length * ((jnp.exp(-rate * n * v) * _power(shifted, p)) @ w)
    return j, m


def fou_covariance(
    hurst: ArrayLike, s: ArrayLike, t: ArrayLike, theta: ArrayLike, sigma: ArrayLike = 1.0, kind: str = "I"
) -> Float[Array, " *shape"]:
    r"""Covariance of the fractional Ornstein-Uhlenbeck process $dX=-\theta X\,dt+\sigma\,dB$ from 0, elementwise.

    For kind I and $s\le t$, $d=t-s$, reducing the double integral of the solution along its diagonals gives
    $$\tfrac{\sigma^2}{2}\{s^{2H}e^{-\theta t}+t^{2H}e^{-\theta s}-d^{2H}
      +\tfrac\theta2[e^{-\theta d}L(s)+J(d)+M(d,s)-e^{-\theta t}J(s)-e^{-\theta s}J(t)]\},$$
    with $J(x)=\int_0^x e^{-\theta(x-r)}r^{2H}dr$, $M(d,s)=\int_0^s e^{-\theta w}(d+w)^{2H}dw$ and $L(s)=M(0,s)$: smooth
    one-dimensional integrals, done by doubly exponential quadrature; no division by $\theta$, so 0 is allowed.

    Args:
        hurst: Hurst index in (0, 1).
        s: first time, non-negative.
        t: second time, non-negative.
        theta: mean reversion rate (per unit of time); 0 gives `sigma ** 2` times the fBm covariance.
        sigma: noise scale.
        kind: "I" or "II", the kind of driving noise.

    Returns:
        The covariance, of the broadcast shape of the arguments.

    Raises:
        ValueError: if `hurst` is outside (0, 1), a time is negative or `kind` is unknown.

    Example:
        >>> from genkit.noise import fou_covariance
        >>> round(float(fou_covariance(0.7, 2.0, 2.0, 1.0)), 4)
        0.5643

    Source: kind I is the formula of Cheridito, Kawaguchi and Maejima, "Fractional Ornstein-Uhlenbeck processes",
    2003, for a start at 0 (the reduction to single integrals was derived for this library).
    """
    check_choice("kind", kind, KINDS)
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check_interval("s", s, 0)
    check_interval("t", t, 0)
    h, s, t, theta, sigma = _as_floats(hurst, s, t, theta, sigma)
    lo, hi = jnp.minimum(s, t), jnp.maximum(s, t)
    if kind == "II":
        return sigma**2 * _fou_kind_two(h, lo, hi - lo, theta)
    gap, zero, p = hi - lo, jnp.zeros_like(lo), 2 * h
    j_lo, l_lo = _decays(h, theta, lo, lo, p)[0], _decays(h, theta, zero, lo, p)[1]
    j_hi = _decays(h, theta, hi, zero, p)[0]
    j_gap, m = _decays(h, theta, gap, lo, p)
    e_lo, e_hi, e_gap = jnp.exp(-theta * lo), jnp.exp(-theta * hi), jnp.exp(-theta * gap)
    plain = _power(lo, p) * e_hi + _power(hi, p) * e_lo - _power(gap, p)
    return sigma**2 / 2 * (plain + theta / 2 * (e_gap * l_lo + j_gap + m - e_hi * j_lo - e_lo * j_hi))


def _fou_kind_two(h: Array, lo: Array, gap: Array, theta: Array) -> Array:
    """Kernel of the process is w^a - theta J_a(w); its most singular product is the kind II covariance itself."""
    v, w = _nodes(h.dtype)

    def entry(args: tuple[Array, Array, Array, Array]) -> Array:
        h, lo, gap, theta = args
        a, near = h - 0.5, lo * v
        far = gap + near
        rate, power = jnp.full_like(near, theta), jnp.full_like(near, a)
        zero = jnp.zeros_like(near)
        j_near = theta * _decays(near, rate, near, zero, power)[0]
        j_far = theta * _decays(near, rate, far, zero, power)[0]
        rest = j_near * j_far - _power(near, a) * j_far - j_near * _power(far, a)
        return _kind_two(h, lo, gap) + 2 * h * lo * (rest @ w)

    flat = tuple(x.ravel() for x in (h, lo, gap, theta))
    return jax.lax.map(entry, flat, batch_size=16).reshape(h.shape)


def stationary_fou_variance(hurst: ArrayLike, theta: ArrayLike, sigma: ArrayLike = 1.0) -> Float[Array, " *shape"]:
    r"""Variance $\sigma^2\Gamma(2H+1)/(2\theta^{2H})$ of the stationary fractional Ornstein-Uhlenbeck process (kind I).

    Args:
        hurst: Hurst index in (0, 1).
        theta: mean reversion rate, positive.
        sigma: noise scale.

    Returns:
        The variance, of the broadcast shape of the arguments.

    Raises:
        ValueError: if `hurst` is outside (0, 1) or `theta` is not positive.

    Example:
        >>> from genkit.noise import stationary_fou_variance
        >>> float(stationary_fou_variance(0.5, 1.0))
        0.5
    """
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check_positive("theta", theta)
    h, theta, sigma = _as_floats(hurst, theta, sigma)
    return sigma**2 * jnp.exp(gammaln(2 * h + 1) - 2 * h * jnp.log(theta)) / 2
