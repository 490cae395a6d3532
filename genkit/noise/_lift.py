"""Fractional Brownian motion as a superposition of Ornstein-Uhlenbeck processes that share one Brownian motion."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from scipy.special import gammaln as host_gammaln

from genkit._core._checks import check, check_choice, check_count, check_interval, check_positive, is_concrete

from ._tables import HURST_RANGE, NUM_COEFFICIENTS, chebyshev_tables, grid


KINDS = ("I", "II", "I-published")
_ROUNDING = 1e-7  # how far float32 may put an index beyond the end of the range


class Lift(eqx.Module):
    r"""A Markov lift of fractional Brownian motion on the unit clock.

    $$\hat B(t)=\sum_k\omega_k(H)\,Y_k(t)+\sum_k(1-e^{-\gamma_kt})\,c_k,\qquad dY_k=-\gamma_kY_k\,dt+dW,\ Y_k(0)=0,$$

    with one Brownian motion $W$ for all $k$ and a Gaussian history $c=F(H)\xi$, $\xi\sim N(0,I)$, independent of $W$,
    which carries what a process of kind I owes to its past. On a horizon $T$, $B(tT)=T^H\hat B(t)$ in law, so one
    table serves every horizon. With no terms, $\hat B=W$. Build one with `ma_fbm` or `brownian`.

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
    kinds "II" and "I-published"). The separate law of the history (kind "I") was derived for this library.
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
        return grid(self.num_terms, self.lo, self.hi) if self.num_terms else np.zeros(0)

    @property
    def history_rank(self) -> int:
        """Number of standard normals that make up the history."""
        if self.num_terms == 0 or self.kind == "II":
            return 0
        return self.num_terms if self.kind == "I-published" else self._tables()[1].shape[-1]

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        return chebyshev_tables(self.num_terms, self.lo, self.hi, self.kind)

    def _checked(self, hurst: ArrayLike) -> Array:
        check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
        if self.num_terms and is_concrete(hurst):
            given = np.asarray(hurst, np.float64)
            ends = np.clip(given, *HURST_RANGE)
            check_interval("hurst", np.where(np.abs(given - ends) < _ROUNDING, ends, given), *HURST_RANGE)
        return jnp.asarray(hurst, jnp.result_type(float, jnp.asarray(hurst)))

    def weights(self, hurst: ArrayLike) -> Float[Array, " *batch k"]:
        """The weights omega of unit-variance noise; differentiable in `hurst`.

        Args:
            hurst: Hurst index in [0.01, 0.99], any shape.

        Returns:
            The weights, shape `(*hurst.shape, K)`. Combined in float64 on the host when `hurst` is concrete.

        Raises:
            ValueError: if `hurst` is outside its range.
        """
        hurst = self._checked(hurst)
        if self.num_terms == 0:
            return jnp.zeros((*hurst.shape, 0), hurst.dtype)
        h, basis, xp = _chebyshev(hurst)
        scale = _normaliser(h, self.kind, xp)
        return jnp.asarray(basis @ xp.asarray(self._tables()[0], basis.dtype) * scale[..., None], hurst.dtype)

    def history(self, hurst: ArrayLike) -> Float[Array, " *batch k r"]:
        """The factor F with Cov(c) = F F' of unit-variance noise; differentiable in `hurst`.

        Args:
            hurst: Hurst index in [0.01, 0.99], any shape.

        Returns:
            The factor, shape `(*hurst.shape, K, r)`, r = `history_rank`.

        Raises:
            ValueError: if `hurst` is outside its range.
        """
        hurst = self._checked(hurst)
        if self.kind == "I-published" and self.num_terms:
            # c_k = -omega_k Y_k(0) with the Y_k(0) stationary
            root = np.linalg.cholesky(
                1.0 / (self.gamma[:, None] + self.gamma[None, :]) + 1e-14 * np.eye(self.num_terms)
            )
            return -self.weights(hurst)[..., None] * jnp.asarray(root, hurst.dtype)
        if self.history_rank == 0:
            return jnp.zeros((*hurst.shape, self.num_terms, 0), hurst.dtype)
        _, basis, xp = _chebyshev(hurst)
        table = self._tables()[1]
        flat = basis @ xp.asarray(table.reshape(table.shape[0], -1), basis.dtype)
        return jnp.asarray(flat.reshape(*hurst.shape, *table.shape[1:]), hurst.dtype)

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
        dtype = jnp.result_type(float, jnp.asarray(hurst), jnp.asarray(s), jnp.asarray(t))
        s, t = jnp.broadcast_arrays(jnp.asarray(s, dtype), jnp.asarray(t, dtype))
        if self.num_terms == 0:
            return jnp.minimum(s, t)
        lo, gap = jnp.minimum(s, t)[..., None, None], jnp.abs(t - s)[..., None, None]
        omega, factor = self.weights(hurst), self.history(hurst)
        g = jnp.asarray(self.gamma, dtype)
        total = g[:, None] + g[None, :]
        cross = jnp.exp(-g * gap) * -jnp.expm1(-total * lo) / total
        noise = jnp.einsum("...ij,i,j->...", cross, omega, omega)
        past_s, past_t = (-jnp.expm1(-g * x[..., None]) @ factor for x in (s, t))
        return noise + jnp.sum(past_s * past_t, axis=-1)


def _chebyshev(hurst: Array) -> tuple:
    """T_n at the index mapped to [-1, 1]; NumPy in float64 when the index is known, else JAX in its own dtype."""
    xp = np if is_concrete(hurst) else jnp
    h = np.asarray(hurst, np.float64) if xp is np else hurst
    centre, half = float(np.mean(HURST_RANGE)), float(np.ptp(HURST_RANGE) / 2)
    x = (h - centre) / half
    # The ends of the range, rounded in float32, may lie outside; strictly inside, arccos has a finite derivative.
    inside = 1 - float(np.finfo(x.dtype).epsneg)
    clipped = xp.where(xp.abs(x) < 1 + _ROUNDING / half, xp.clip(x, -inside, inside), x)
    angle = xp.arccos(clipped if xp is np else x + jax.lax.stop_gradient(clipped - x))
    return h, xp.cos(angle[..., None] * xp.arange(NUM_COEFFICIENTS, dtype=h.dtype)), xp


def _normaliser(h: Any, kind: str, xp: Any) -> Any:
    """Factor that brings the variance at t = 1 to one."""
    log_gamma = host_gammaln if xp is np else gammaln
    if kind == "II":
        return xp.sqrt(2 * h) * xp.exp(log_gamma(h + 0.5))
    return xp.sqrt(xp.exp(log_gamma(2 * h + 1)) * xp.sin(np.pi * h))


def ma_fbm(num_terms: int = 8, lo: float = 0.05, hi: float = 1e4, kind: str = "I") -> Lift:
    """Markov approximation of fractional Brownian motion by `num_terms` Ornstein-Uhlenbeck processes.

    The default keeps the relative error of the covariance below 6e-4 for H in [0.3, 0.98], below 2e-3 from H = 0.1 and
    below 4e-3 down to 0.01 (kind "II": 1.2 % at 0.05, 2.5 % at 0.01). `num_terms=5, hi=1e3` is the cheap setting: below
    4e-3 from H = 0.3, 1 % from 0.1, 1.2 % down to 0.01. What is faster than `hi` enters as the fastest process, with
    the right variance (kinds "I" and "II").

    Args:
        num_terms: number K of processes, at least 1.
        lo: smallest speed on the unit clock (the horizon is 1).
        hi: largest speed on the unit clock; transitions are exact, so any speed is stable.
        kind: "I" (kind I with its own law of the past: accurate over the whole range of H), "II" (Riemann-Liouville) or
            "I-published" (kind I from stationary processes, as published, normalised to unit variance of the target).

    Returns:
        A `Lift`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from genkit.noise import ma_fbm
        >>> abs(float(ma_fbm().covariance(0.7, 1.0, 1.0)) - 1.0) < 1e-3
        True
    """
    check_count("num_terms", num_terms)
    check_positive("lo", lo)
    check_positive("hi", hi)
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
