"""Fractional Brownian motion as a superposition of Ornstein-Uhlenbeck processes that share one Brownian motion."""

import functools
import math
from types import ModuleType

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.scipy.special import gammaln
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from scipy.special import gammaln as host_gammaln

from genkit._core._checks import check, check_choice, check_count, check_interval, check_positive
from genkit._core._known import Numbers, array_module, float_dtype, on_host
from genkit.noise._tables import HURST_RANGE, NUM_COEFFICIENTS, chebyshev_tables, grid, start_projection


KINDS = ("I", "II", "I-published")
# How far float32 may put an index beyond the end of the range.
_ROUNDING = 1e-7
_DEFAULT_TERMS = 8
_DEFAULT_LO = 0.05
_DEFAULT_HI = 1e4
# Between neighboring speeds, with which the default settings are as accurate as they say.
_RATIO = 6.0
# Largest speed, for each point: an index fitted to 10,000 is then right to a quarter error.
_SPEED_PER_POINT = 100.0
# Increments whose joint covariance is compared.
_STRETCH = 128
# Indices looked at where the index itself is traced.
_TYPICAL = (0.2, 0.3, 0.7, 0.8)


class Lift(eqx.Module):
    r"""A Markov lift of fractional Brownian motion on the unit clock.

    $$\hat B(t)=\sum_k\omega_k(H)\,Y_k(t)+\sum_k(1-e^{-\gamma_kt})\,c_k,\qquad dY_k=-\gamma_kY_k\,dt+dW,\ Y_k(0)=0,$$

    with one Brownian motion $W$ for all $k$ and a Gaussian history $c=F(H)\xi$, $\xi\sim N(0,I)$, independent of $W$,
    which carries what a process of kind I owes to its past. On a horizon $T$, $B(tT)$ and
    $T^H\hat B(t)$ have one distribution, so one table serves every horizon. With no terms,
    $\hat B=W$. Build one with `ma_fbm` or `brownian`.

    The module holds only the four numbers that define it; its tables are computed once on the host in float64 and
    remembered, so that no optimizer can mistake them for parameters and no compiled program solves for them.

    Args:
        num_terms: number K of Ornstein-Uhlenbeck processes.
        lo: smallest speed, per unit of the unit clock.
        hi: largest speed.
        kind: "I", "II" or "I-published".

    Example:
        >>> from genkit.noise import ma_fbm
        >>> ma_fbm(5, 0.05, 1e3).weights(0.7).shape
        (5,)

    Source: Harms and Stefanovits, "Affine representations of fractional processes with applications in mathematical
    finance", 2019; Daems et al., "Variational inference for SDEs driven by fractional noise", ICLR 2024 (weights of
    kinds "II" and "I-published"). The separate distribution of the history (kind "I") was derived for this library.
    """

    num_terms: int = eqx.field(static=True)
    lo: float = eqx.field(static=True)
    hi: float = eqx.field(static=True)
    kind: str = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_terms", self.num_terms, minimum=0)
        check_choice("kind", self.kind, KINDS)
        if self.num_terms:
            check_positive("lo", self.lo)
            check(self.hi > self.lo or self.num_terms == 1, "hi", f"greater than lo = {self.lo}", self.hi)

    @property
    def gamma(self) -> np.ndarray:
        """The speeds, float64, shape (K,)."""
        if self.num_terms == 0:
            return np.zeros(0)
        return grid(self.num_terms, self.lo, self.hi)

    @property
    def hurst_range(self) -> tuple[float, float]:
        """Least and largest Hurst index that this lift represents; 1/2 alone without terms."""
        if self.num_terms == 0:
            return (0.5, 0.5)
        return HURST_RANGE

    @property
    def history_rank(self) -> int:
        """Number of standard normals that make up the history."""
        if self.num_terms == 0 or self.kind == "II":
            return 0
        if self.kind == "I-published":
            return self.num_terms
        return self._tables()[1].shape[-1]

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        return chebyshev_tables(self.num_terms, self.lo, self.hi, self.kind)

    def _checked(self, hurst: ArrayLike) -> Numbers:
        """The index in floating point, on the host where it is known."""
        check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
        given = on_host(hurst)
        if given is None:
            return jnp.asarray(hurst, float_dtype(hurst))
        if self.num_terms:
            wide = given.astype(np.float64)
            ends = np.clip(wide, *HURST_RANGE)
            check_interval("hurst", np.where(np.abs(wide - ends) < _ROUNDING, ends, wide), *HURST_RANGE)
        return given.astype(float_dtype(hurst))

    def weights(self, hurst: ArrayLike) -> Float[Array, " *batch k"]:
        """The weights omega of unit-variance noise; differentiable in `hurst`.

        Args:
            hurst: Hurst index in [0.01, 0.99], any shape.

        Returns:
            The weights, shape `(*hurst.shape, K)`. Combined in float64 on the host when `hurst` is concrete.

        Raises:
            ValueError: if `hurst` is outside its range.
        """
        index = self._checked(hurst)
        if self.num_terms == 0:
            return jnp.zeros((*index.shape, 0), index.dtype)
        return jnp.asarray(self.scaled_weights(index), index.dtype)

    def scaled_weights(self, hurst: Numbers) -> Numbers:
        """The weights themselves, in float64 on the host where the index is known.

        Args:
            hurst: Hurst index, in floating point.

        Returns:
            The weights, shape `(*hurst.shape, K)`.
        """
        h, basis, xp = _chebyshev(hurst)
        table = xp.asarray(self._tables()[0], basis.dtype)
        return basis @ table * _normalizer(h, self.kind, xp)[..., None]

    def history(self, hurst: ArrayLike) -> Float[Array, " *batch k r"]:
        """The factor F with Cov(c) = F F' of unit-variance noise; differentiable in `hurst`.

        Args:
            hurst: Hurst index in [0.01, 0.99], any shape.

        Returns:
            The factor, shape `(*hurst.shape, K, r)`, r = `history_rank`.

        Raises:
            ValueError: if `hurst` is outside its range.
        """
        index = self._checked(hurst)
        if self.kind == "I-published" and self.num_terms:
            # c_k = -omega_k Y_k(0) with the Y_k(0) stationary; the ridge is for speeds too close to tell apart.
            total = self.gamma[:, None] + self.gamma[None, :]
            root = np.linalg.cholesky(1.0 / total + 1e-14 * np.eye(self.num_terms))
            return -self.weights(hurst)[..., None] * jnp.asarray(root, index.dtype)
        if self.history_rank == 0:
            return jnp.zeros((*index.shape, self.num_terms, 0), index.dtype)
        return jnp.asarray(self._past(index), index.dtype)

    def _past(self, hurst: Numbers) -> Numbers:
        """The factor of the history; in float64 on the host where the index is known."""
        _, basis, xp = _chebyshev(hurst)
        table = self._tables()[1]
        flat = basis @ xp.asarray(table.reshape(table.shape[0], -1), basis.dtype)
        return flat.reshape(*hurst.shape, *table.shape[1:])

    def start_loading(
        self, hurst: Float[ArrayLike, " *batch"], rate: Float[ArrayLike, " *batch"]
    ) -> Float[Array, " *batch r"]:
        r"""Covariance of a stationary fractional Ornstein-Uhlenbeck state at time 0 with the normals of the history.

        The state $X(0)=\int_{-\infty}^0e^{\theta s}dB(s)$ of $dX=-\theta X\,dt+dB$ and the history come from the same
        past. With $\xi$ the standard normals that `history` multiplies, $E[X(0)\,\xi]$ is this vector.

        Args:
            hurst: Hurst index in [0.01, 0.99], any shape.
            rate: mean reversion rate theta on the unit clock (times the horizon), positive, of the same shape.

        Returns:
            The covariances, shape `(*hurst.shape, r)`, r = `history_rank`; differentiable in both arguments.

        Raises:
            ValueError: if the lift is not of kind "I", or an index is outside its range.
        """
        hurst = jnp.asarray(self._checked(hurst))
        rate = jnp.asarray(rate, hurst.dtype)
        if self.num_terms == 0:
            return jnp.zeros((*hurst.shape, 0), hurst.dtype)
        check(
            self.kind == "I", "kind", "'I' for a stationary start, whose past is that of the process", repr(self.kind)
        )
        log_speed, projection = start_projection(self.num_terms, self.lo, self.hi)
        h = hurst[..., None]
        x = jnp.asarray(log_speed, hurst.dtype)
        # g ** (1 - H) / (g + theta) by logarithms, because the slowest speeds are 1e-150
        log_cov = (1 - h) * x - jnp.logaddexp(x, jnp.log(rate)[..., None])
        scale = _normalizer(h, self.kind, jnp)
        return scale * jnp.exp(log_cov) @ jnp.asarray(projection, hurst.dtype)

    def divergence_estimate(self, hurst: ArrayLike, gaps: np.ndarray) -> float:
        """Kullback-Leibler divergence to expect from exact to lifted noise at given times, seen without error.

        Computed for a stretch of equal gaps in the middle of the horizon and multiplied by the number of points. An
        observation error, which hides the fastest motion, makes it less.

        Args:
            hurst: Hurst index, any shape; the worst counts. Where it is traced, the best of some typical ones does.
            gaps: times between neighboring points on the unit clock, shape (n,).

        Returns:
            The estimate in nats.

        Raises:
            ValueError: if an index is outside its range.

        Example:
            >>> import numpy as np
            >>> from genkit.noise import ma_fbm
            >>> ma_fbm().divergence_estimate(0.7, np.full(100, 0.01)) < 0.1
            True
        """
        gaps = gaps[gaps > 0]
        if self.num_terms == 0 or gaps.size == 0:
            return 0.0
        # A few quantiles stand for all gaps; rounded, so that the cache knows them again.
        levels = np.minimum(np.quantile(gaps, (0.1, 0.5, 0.9)), 0.5)
        levels = [float(f"{level:.5g}") for level in levels]

        def estimate(h: float) -> float:
            return float(np.mean([_divergence(self, h, level, gaps.size) for level in levels]))

        index = on_host(hurst)
        if index is None:
            return min(estimate(h) for h in _TYPICAL)
        lo, hi = HURST_RANGE
        return max(estimate(float(f"{min(max(h, lo), hi):.4g}")) for h in np.ravel(index))

    def covariance(self, hurst: ArrayLike, s: ArrayLike, t: ArrayLike) -> Float[Array, " *shape"]:
        """Exact covariance of the lifted process on horizon 1, elementwise over broadcast times.

        Args:
            hurst: Hurst index in [0.01, 0.99], a scalar.
            s: first time in [0, 1]; `ts[:, None]` with `t=ts[None, :]` gives a matrix.
            t: second time in [0, 1].

        Returns:
            The covariance, of the broadcast shape of `s` and `t`.

        Raises:
            ValueError: if `hurst` is outside its range or a time is negative.
        """
        check(jnp.ndim(hurst) == 0, "hurst", "a scalar", hurst, "Use jax.vmap for several.")
        check_interval("s", s, 0)
        check_interval("t", t, 0)
        dtype = float_dtype(hurst, s, t)
        shape = jnp.broadcast_shapes(jnp.shape(s), jnp.shape(t))
        s = jnp.broadcast_to(jnp.asarray(s, dtype), shape)
        t = jnp.broadcast_to(jnp.asarray(t, dtype), shape)
        if self.num_terms == 0:
            return jnp.minimum(s, t)
        lo = jnp.minimum(s, t)[..., None, None]
        gap = jnp.abs(t - s)[..., None, None]
        omega = self.weights(hurst)
        factor = self.history(hurst)
        g = jnp.asarray(self.gamma, dtype)
        total = g[:, None] + g[None, :]
        cross = jnp.exp(-g * gap) * -jnp.expm1(-total * lo) / total
        noise = jnp.einsum("...ij,i,j->...", cross, omega, omega)
        past_s = -jnp.expm1(-g * s[..., None]) @ factor
        past_t = -jnp.expm1(-g * t[..., None]) @ factor
        return noise + jnp.sum(past_s * past_t, axis=-1)


@functools.lru_cache(maxsize=1024)
def _divergence(lift: Lift, hurst: float, gap: float, num: int) -> float:
    """Divergence from exact to lifted increments, of `num` of them, by that of a stretch in the middle."""
    size = max(1, min(num, _STRETCH, int(0.5 / gap)))
    exact = scipy.linalg.toeplitz(_exact_increments(hurst, gap, size, lift.kind))
    lifted = scipy.linalg.toeplitz(_lifted_increments(lift, hurst, gap, size))
    try:
        root = np.linalg.cholesky(lifted)
    except np.linalg.LinAlgError:  # so coarse that neighboring increments are all but equal
        return np.inf
    ratio = scipy.linalg.cho_solve((root, True), exact)
    divergence = (np.trace(ratio) - size - np.linalg.slogdet(ratio)[1]) / 2
    return max(float(divergence), 0.0) * num / size


def _lifted_increments(lift: Lift, hurst: float, gap: float, size: int) -> np.ndarray:
    """Covariances at lags 0 to size - 1 of increments of the lifted process around the middle of the horizon."""
    start = 0.5
    h = np.float64(hurst)
    omega = lift.scaled_weights(np.asarray(h))
    g = lift.gamma
    total = g[:, None] + g[None, :]
    lost = -np.expm1(-g * gap)
    # An increment is (exp(-g gap) - 1) Y plus fresh noise; after k gaps both have decayed.
    moved = np.outer(lost, lost) * -np.expm1(-total * start) / total
    fresh = -np.expm1(-total * gap) / total
    lags = np.arange(size)
    decay = np.exp(-np.outer(np.maximum(lags - 1, 0), g * gap))
    own = omega @ (moved + fresh) @ omega
    later = moved * np.exp(-g * gap) - fresh * lost
    cov = (decay * omega) @ (omega @ later)
    cov[0] = own
    if lift.history_rank:
        factor = np.asarray(lift.history(h), np.float64)
        past = (np.exp(-np.outer(start + lags * gap, g)) * lost) @ factor
        cov += past @ past[0]
    return cov


def _exact_increments(hurst: float, gap: float, size: int, kind: str) -> np.ndarray:
    """The same of fractional Brownian motion; of kind II what a past before 0 would have added is taken off."""
    k = np.arange(size, dtype=float)
    p = 2 * hurst
    cov = gap**p * (np.abs(k + 1) ** p - 2 * k**p + np.abs(k - 1) ** p) / 2
    if kind == "II":
        cov -= np.square(_past_slope(hurst)) * gap**2
    return cov


def _past_slope(hurst: float) -> float:
    """Standard deviation of the rate at which the past moves kind I in the middle of the horizon."""
    a = hurst - 0.5
    scale = math.sqrt(math.gamma(2 * hurst + 1) * math.sin(math.pi * hurst)) / math.gamma(hurst + 0.5)
    return scale * abs(a) * 0.5 ** (hurst - 1) / math.sqrt(2 - 2 * hurst)


def _chebyshev(
    hurst: Numbers,
) -> tuple[Numbers, Numbers, ModuleType]:
    """T_n at the index mapped to [-1, 1]; NumPy in float64 where the index is known, else JAX in its own dtype."""
    xp = array_module(hurst)
    h = hurst
    if xp is np:
        h = np.asarray(hurst, np.float64)
    center = float(np.mean(HURST_RANGE))
    half = float(np.ptp(HURST_RANGE) / 2)
    x = (h - center) / half
    # The ends of the range, rounded in float32, may lie outside; strictly inside, arccos has a finite derivative.
    inside = 1 - float(np.finfo(x.dtype).epsneg)
    clipped = xp.where(xp.abs(x) < 1 + _ROUNDING / half, xp.clip(x, -inside, inside), x)
    if xp is jnp:
        clipped = x + jax.lax.stop_gradient(clipped - x)
    angle = xp.arccos(clipped)
    return h, xp.cos(angle[..., None] * xp.arange(NUM_COEFFICIENTS, dtype=h.dtype)), xp


def _normalizer(h: Numbers, kind: str, xp: ModuleType) -> Numbers:
    """Factor that brings the variance at t = 1 to one."""
    log_gamma = gammaln
    if xp is np:
        log_gamma = host_gammaln
    if kind == "II":
        return xp.sqrt(2 * h) * xp.exp(log_gamma(h + 0.5))
    return xp.sqrt(xp.exp(log_gamma(2 * h + 1)) * xp.sin(np.pi * h))


def ma_fbm(
    num_terms: int | None = None,
    lo: float = _DEFAULT_LO,
    hi: float | None = None,
    kind: str = "I",
    num_points: int | None = None,
) -> Lift:
    """Markov approximation of fractional Brownian motion by `num_terms` Ornstein-Uhlenbeck processes.

    The default keeps the relative error of the covariance below 6e-4 for H in [0.3, 0.98], below 2e-3 from H = 0.1 and
    below 4e-3 down to 0.01 (kind "II": 1.2 % at 0.05, 2.5 % at 0.01). `num_terms=5, hi=1e3` is the cheap setting: below
    4e-3 from H = 0.3, 1 % from 0.1, 1.2 % down to 0.01. What is faster than `hi` enters as the fastest process, with
    the right variance (kinds "I" and "II").

    Args:
        num_terms: number K of processes, at least 1; default 8, or one for each factor of 6 between `lo` and `hi`
            where `num_points` is given.
        lo: smallest speed on the unit clock (the horizon is 1).
        hi: largest speed on the unit clock; transitions are exact, so any speed is stable. Default 1e4.
        kind: "I" (kind I with its own distribution of the past: accurate over the whole range of H), "II"
            (Riemann-Liouville) or "I-published" (kind I from stationary processes, as published, normalized to unit
            variance of the target).
        num_points: number n of points of the series that is looked at, as if spread evenly over the horizon: `hi` is
            then at least 100 n. The default serves about a thousand points.

    Returns:
        A `Lift`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from genkit.noise import ma_fbm
        >>> abs(float(ma_fbm().covariance(0.7, 1.0, 1.0)) - 1.0) < 1e-3
        True
    """
    check_positive("lo", lo)
    if num_points is not None:
        check_count("num_points", num_points)
        if hi is None:
            hi = max(_DEFAULT_HI, _SPEED_PER_POINT * num_points)
    if hi is None:
        hi = _DEFAULT_HI
    check_positive("hi", hi)
    if num_terms is None and num_points is not None:
        num_terms = 1 + max(1, math.ceil(math.log(hi / lo) / math.log(_RATIO) - 1e-9))
    elif num_terms is None:
        num_terms = _DEFAULT_TERMS
    check_count("num_terms", num_terms)
    return Lift(num_terms, float(lo), float(hi), kind)


def brownian() -> Lift:
    """Brownian motion: the lift with no Ornstein-Uhlenbeck process.

    Returns:
        A `Lift`; its Hurst index is 1/2.

    Example:
        >>> from genkit.noise import brownian
        >>> float(brownian().covariance(0.5, 0.2, 0.7))
        0.2...
    """
    return Lift(0, 0.0, 0.0, "I")
