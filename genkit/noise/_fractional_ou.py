"""Second moments of the fractional Ornstein-Uhlenbeck process, without cancellation at any rate of reversion."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genkit._core._checks import check_finite, check_interval, check_positive
from genkit.noise._covariance import as_floats, check_pair, valid_index
from genkit.noise._quadrature import tanh_sinh


# exp(-40) is below rounding in float64: integrals against exp(-theta w) stop at theta w = 40.
_CUT = 40.0
# Nodes and span of integrands as singular as w ** (2 H - 1): the ends reach exp(-1400).
_WIDE = (151, 6.8)
# Of the inner integrals, whose singularities are milder than w ** (-1/2).
_NARROW = (61, 4.0)
# Gauss-Legendre in log w beyond the cut.
_FAR_NODES = 48
# Entries of a matrix computed at a time: a few dozen arrays of this many by 151 nodes are alive at once.
_BLOCK = 4096


def _safe_log(x: Array) -> Array:
    return jnp.log(jnp.where(x > 0, x, 1.0))


class _Decay:
    """Nodes for integrals of exp(-theta w) f(w) over (0, length), f with power singularities at both ends.

    Distances from both ends are kept as logarithms, because w ** (2 H - 1) has weight far below the smallest float.
    """

    def __init__(self, theta: Array, length: Array):
        log_v, log_rest, self.log_weight = tanh_sinh(*_WIDE).cast(length.dtype)
        long = theta * length > _CUT
        reach = jnp.where(long, _CUT / jnp.where(long, theta, 1.0), length)[..., None]
        self.reach = reach
        self.near = reach * jnp.exp(log_v)
        self.rest = reach * jnp.exp(log_rest)
        self.log_near = _safe_log(reach) + log_v
        self.log_rest = _safe_log(reach) + log_rest
        self.decay = jnp.exp(-theta[..., None] * self.near)

    def log_after(self, start: Array) -> Array:
        """log(start + w), start >= 0."""
        start = start[..., None]
        return jnp.where(start > 0, _safe_log(start + self.near), self.log_near)

    def before(self, end: Array) -> tuple[Array, Array]:
        """`end - w` and its logarithm, end >= length."""
        beyond = end[..., None] - self.reach
        return beyond + self.rest, jnp.where(beyond > 0, _safe_log(beyond + self.rest), self.log_rest)

    def power(self, exponent: Array, log_base: Array) -> Array:
        """Powers of the base, times the weights of the rule."""
        return jnp.exp(exponent[..., None] * log_base + self.log_weight)

    def growth(self, exponent: Array, base: Array, log_base: Array, more: Array, log_sum: Array) -> Array:
        """(base + more) ** exponent - base ** exponent, by expm1 where the two are close."""
        close = more < base
        ratio = jnp.where(close, more, 0.0) / jnp.where(close, base, 1.0)
        power = self.power(exponent, jnp.where(close, log_base, 0.0))
        fine = power * jnp.expm1(exponent[..., None] * jnp.log1p(ratio))
        return jnp.where(close, fine, self.power(exponent, log_sum) - self.power(exponent, log_base))

    def integral(self, values: Array) -> Array:
        """The integral of values at the nodes that already carry the weights."""
        return jnp.sum(self.decay * values, axis=-1) * self.reach[..., 0]


def _in_blocks(entry: Callable[..., Array], size: int, *values: Array) -> Array:
    """`entry` of arrays of one shape, `size` entries at a time, computed again for gradients instead of stored."""
    flat = [v.ravel() for v in values]
    block = jax.checkpoint(entry)
    if flat[0].shape[0] <= size:
        return block(*flat).reshape(values[0].shape)
    result = jax.lax.map(lambda args: block(*(a[None] for a in args))[0], tuple(flat), batch_size=size)
    return result.reshape(values[0].shape)


def fou_covariance(
    hurst: ArrayLike, s: ArrayLike, t: ArrayLike, theta: ArrayLike, sigma: ArrayLike = 1.0, kind: str = "I"
) -> Float[Array, " *shape"]:
    r"""Covariance of the fractional Ornstein-Uhlenbeck process $dX=-\theta X\,dt+\sigma\,dB$ from 0, elementwise.

    For kind I and $s\le t$, $d=t-s$, $p=2H-1$, reducing the double integral of the solution along its diagonals gives
    $$\tfrac{\sigma^2H}2\{e^{-\theta s}J(t)+e^{-\theta t}J(s)+e^{-\theta d}L(s)+M(d,s)-J(d)\},$$
    with $J(x)=\int_0^xe^{-\theta(x-r)}r^pdr$, $M(d,s)=\int_0^se^{-\theta w}(d+w)^pdw$ and $L(s)=M(0,s)$. For kind II it
    is $2H\sigma^2\int_0^sk(w)k(d+w)dw$ with the kernel $k(w)=w^{H-1/2}\,{}_1F_1(1;H+\tfrac12;-\theta w)$. Differences
    of close powers are taken inside the integrals, so that no digits are lost at any $\theta s$; no division by
    $\theta$, so 0 is allowed.

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
    check_pair(hurst, s, t, kind)
    check_finite("theta", theta)
    h, s, t, theta, sigma = as_floats(hurst, s, t, theta, sigma)
    h = valid_index(h)
    lo = jnp.minimum(s, t)
    hi = jnp.maximum(s, t)
    if kind == "I":
        return sigma**2 * _kind_one(h, lo, hi, theta)
    return sigma**2 * _kind_two(h, lo, hi, theta)


@jax.jit
def _kind_one(h: Array, lo: Array, hi: Array, theta: Array) -> Array:
    return _in_blocks(_kind_one_entries, _BLOCK, h, lo, hi, theta)


def _kind_one_entries(h: Array, lo: Array, hi: Array, theta: Array) -> Array:
    p = 2 * h - 1
    gap = hi - lo
    # the width that the two J do not share is given, because in hi - (gap - lo) its digits would be lost
    past = _recent(p, jnp.maximum(gap - lo, 0.0), jnp.minimum(2 * lo, hi), theta)
    rest = jnp.exp(-theta * hi) * _recent(p, jnp.zeros_like(lo), lo, theta)
    start = _Decay(theta, lo)
    rest += jnp.exp(-theta * gap) * start.integral(start.power(p, start.log_near))
    total = _symmetric(p, lo, gap, theta) + jnp.exp(-theta * lo) * past + rest
    return jnp.where(lo > 0, h / 2 * total, 0.0)


def _symmetric(p: Array, lo: Array, gap: Array, theta: Array) -> Array:
    """`M(gap, lo)` minus the part of `J(gap)` within `lo` of its end."""
    common = jnp.minimum(lo, gap)
    rule = _Decay(theta, common)
    base, log_base = rule.before(gap)
    both = rule.integral(rule.growth(p, base, log_base, 2 * rule.near, rule.log_after(gap)))
    rule = _Decay(theta, lo - common)
    tail = rule.integral(rule.power(p, rule.log_after(gap + common)))
    return jnp.where(gap > 0, both, 0.0) + jnp.exp(-theta * common) * tail


def _recent(p: Array, less: Array, width: Array, theta: Array) -> Array:
    """`J(less + width) - J(less)`."""
    rule = _Decay(theta, less)
    base, log_base = rule.before(less)
    more = width[..., None]
    grown = rule.integral(rule.growth(p, base, log_base, more, _safe_log(more + base)))
    rule = _Decay(theta, width)
    fresh = rule.integral(rule.power(p, rule.before(width)[1]))
    return jnp.where(less > 0, grown, 0.0) + jnp.exp(-theta * less) * fresh


@jax.jit
def _kind_two(h: Array, lo: Array, hi: Array, theta: Array) -> Array:
    # Each entry holds a double quadrature, hence the small blocks.
    return _in_blocks(jax.vmap(_kind_two_entry), 16, h, lo, hi - lo, theta)


def _kind_two_entry(h: Array, lo: Array, gap: Array, theta: Array) -> Array:
    """Up to the cut in w, beyond it in log w, where the kernel is a power with slowly varying corrections."""
    a = h - 0.5
    rule = _Decay(theta, lo)
    cut = rule.reach[0]
    log_far = rule.log_after(gap)
    kernels = _kernel(a, theta * rule.near) * _kernel(a, theta * (gap + rule.near))
    near = jnp.sum(rule.power(a, rule.log_near + log_far) * kernels) * cut
    host_nodes, host_weights = np.polynomial.legendre.leggauss(_FAR_NODES)
    nodes = jnp.asarray(host_nodes, h.dtype)
    weights = jnp.asarray(host_weights, h.dtype)
    span = _safe_log(lo) - _safe_log(cut)
    log_w = _safe_log(cut) + span * (nodes + 1) / 2
    w = jnp.exp(log_w)
    kernels = _kernel(a, theta * w) * _kernel(a, theta * (gap + w))
    far = span / 2 * (weights @ (jnp.exp((1 + a) * log_w + a * jnp.log(gap + w)) * kernels))
    return jnp.where(lo > 0, 2 * h * (near + far), 0.0)


def _kernel(a: Array, z: Array) -> Array:
    """`1F1(1; a + 1; -z)`: the response of the process to the noise z / theta ago, over that of the noise itself."""
    log_v, log_rest, log_weight = tanh_sinh(*_NARROW).cast(z.dtype)
    long = z > _CUT
    reach = jnp.where(long, _CUT / jnp.where(long, z, 1.0), 1.0)[..., None]
    v = jnp.exp(log_v) * reach
    log_left = jnp.where(long[..., None], jnp.log1p(-jnp.where(long[..., None], v, 0.0)), log_rest)
    scaled = z[..., None]
    inner = jnp.sum(scaled * jnp.exp(-scaled * v + log_weight) * jnp.expm1(a * log_left), axis=-1)
    return jnp.exp(-z) - inner * reach[..., 0]


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
    h, theta, sigma = as_floats(hurst, theta, sigma)
    return sigma**2 * jnp.exp(gammaln(2 * h + 1) - 2 * h * jnp.log(theta)) / 2


def stationary_fou_covariance(
    hurst: ArrayLike, lag: ArrayLike, theta: ArrayLike, sigma: ArrayLike = 1.0
) -> Float[Array, " *shape"]:
    r"""Covariance of the stationary fractional Ornstein-Uhlenbeck process (kind I) at times `lag` apart, elementwise.

    With $p=2H-1$ it is $\tfrac{\sigma^2H}2\{e^{-\theta d}\Gamma(2H)\theta^{-2H}+\int_0^\infty e^{-\theta w}(d+w)^pdw
    -\int_0^de^{-\theta(d-r)}r^pdr\}$ at lag $d$, the limit of `fou_covariance` for late times.

    Args:
        hurst: Hurst index in (0, 1).
        lag: time between the two values, non-negative.
        theta: mean reversion rate, positive.
        sigma: noise scale.

    Returns:
        The covariance, of the broadcast shape of the arguments.

    Raises:
        ValueError: if `hurst` is outside (0, 1), a lag is negative or `theta` is not positive.

    Example:
        >>> from genkit.noise import stationary_fou_covariance
        >>> round(float(stationary_fou_covariance(0.5, 1.0, 1.0)), 4)  # exp(-1) / 2
        0.1839

    Source: limit of the formula of Cheridito, Kawaguchi and Maejima, "Fractional Ornstein-Uhlenbeck processes", 2003,
    reduced to single integrals for this library.
    """
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check_interval("lag", lag, 0)
    check_positive("theta", theta)
    h, lag, theta, sigma = as_floats(hurst, lag, theta, sigma)
    return sigma**2 * _stationary(valid_index(h), lag, theta)


@jax.jit
def _stationary(h: Array, lag: Array, theta: Array) -> Array:
    return _in_blocks(_stationary_entries, _BLOCK, h, lag, theta)


def _stationary_entries(h: Array, lag: Array, theta: Array) -> Array:
    start = jnp.exp(-theta * lag + gammaln(2 * h) - 2 * h * jnp.log(theta))
    # So long a past that the rest of the first integral is below rounding.
    late = lag + _CUT / theta
    return h / 2 * (start + _symmetric(2 * h - 1, late, lag, theta))
