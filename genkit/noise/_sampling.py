"""Exact samples of fractional Brownian motion: Davies-Harte, Hosking, Cholesky."""

from types import ModuleType

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
from scipy import special

from genkit._core._checks import check, check_choice, check_interval, check_key
from genkit._core._known import Numbers, float_dtype, on_host
from genkit._core._memory import check_bytes
from genkit._core._times import check_times, rounding_of
from genkit.noise._covariance import KINDS, fbm_covariance, fgn_autocovariance, valid_index
from genkit.noise._likelihood import levinson_start, levinson_step, levinson_update


METHODS = ("davies_harte", "hosking", "cholesky")
_DEFAULT_METHOD = {"I": "davies_harte", "II": "cholesky"}
# Of n by n in float64 that are alive at once while a covariance is made and factorized.
_MATRICES = 6


def fbm(
    hurst: ArrayLike,
    ts: Float[ArrayLike, " n"],
    *,
    kind: str = "I",
    method: str | None = None,
    key: Key[Array, ""],
) -> Float[Array, " n"]:
    r"""Draw a path of unit-variance fractional Brownian motion, $\operatorname{Var}B(t)=t^{2H}$, exactly.

    Args:
        hurst: Hurst index in (0, 1), a scalar.
        ts: increasing times, non-negative, shape (n,). B(0) = 0.
        kind: "I" (stationary increments) or "II" (Riemann-Liouville, no past).
        method: "davies_harte" (circulant embedding, O(n log n)), "hosking" (prediction from the past, O(n^2)) or
            "cholesky" (any times, O(n^3)). The first two work on kind I with times that are multiples of one spacing,
            starting at a multiple of it. `None` is "davies_harte" for kind I and "cholesky" for kind II. Factors come
            from the host in float64 where `hurst` and `ts` are known; under `jax.jit` with either traced, "cholesky"
            of kind II in float32 is NaN from a few hundred times on.
        key: typed PRNG key.

    Returns:
        The path at `ts`, shape (n,). `jax.vmap` over keys draws many.

    Raises:
        ValueError: if `hurst` is outside (0, 1), the times are negative, not increasing, or unequally spaced under a
            method that needs equal spacing, or `kind` or `method` is unknown or they do not go together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from genkit.noise import fbm
        >>> fbm(0.7, jnp.linspace(0.1, 1.0, 10), key=jax.random.key(0)).shape
        (10,)

    Source: Davies and Harte, "Tests for Hurst effect", 1987; Hosking, "Modeling persistence in hydrological time
    series using fractional differencing", 1984.
    """
    check_choice("kind", kind, KINDS)
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    check(jnp.ndim(hurst) == 0, "hurst", "a scalar", hurst, "Use jax.vmap for several.")
    check_key(key)
    if method is None:
        method = _DEFAULT_METHOD[kind]
    check_choice("method", method, METHODS)
    expected = "'cholesky' for kind 'II', whose increments are not stationary"
    check(kind == "I" or method == "cholesky", "method", expected, repr(method))
    check_times("ts", ts)
    if method == "cholesky":
        return _cholesky(hurst, ts, kind, key)
    spacing, slots = _equal_spacing(ts, method)
    num = int(slots[-1])
    if method == "davies_harte":
        noise = _davies_harte(hurst, num, key)
    else:
        noise = _hosking(hurst, num, key)
    path = jnp.concatenate([jnp.zeros(1, noise.dtype), jnp.cumsum(noise)])
    return jnp.asarray(spacing, path.dtype) ** jnp.asarray(hurst, path.dtype) * path[slots]


def _equal_spacing(ts: ArrayLike, method: str) -> tuple[float, np.ndarray]:
    """The spacing of `ts` and its integer multiples, or an error saying which method takes any times."""
    hint = "Use method='cholesky' for irregular times."
    given = on_host(ts)
    if given is None:
        raise ValueError(f"`ts` must be concrete under method={method!r}; got a traced array. {hint}")
    times = given.astype(np.float64)
    if times.size == 1:
        spacing = float(times[0])
        if spacing == 0:
            spacing = 1.0
        return spacing, np.array([int(times[0] > 0)])
    spacing = float((times[-1] - times[0]) / (times.size - 1))
    slots = np.rint(times / spacing).astype(int)
    # Grids in float32 carry rounding of a few units in the last place of the largest time.
    tolerance = 1e-5 * spacing + 4 * rounding_of(given) * times[-1]
    worst = float(np.max(np.abs(times - slots * spacing)))
    if worst > tolerance or not (np.diff(slots) == 1).all():
        found = f"times off the grid of spacing {spacing:.6g} by up to {worst:.3g}"
        check(False, "ts", f"equally spaced from a multiple of the spacing under method={method!r}", found, hint)
    return spacing, slots


def _cholesky(hurst: ArrayLike, given: ArrayLike, kind: str, key: Array) -> Array:
    """With index and times known the factor comes from float64: float32 cannot tell late times apart."""
    _check_memory(jnp.size(given), kind)
    dtype = float_dtype(given)
    # Before conversion, which a program may stage.
    index = on_host(hurst)
    times = on_host(given)
    ts = jnp.asarray(given, dtype)
    noise = jr.normal(key, ts.shape, dtype)
    if index is not None and times is not None:
        factor = _host_factor(index.astype(np.float64), times.astype(np.float64), kind)
        return jnp.where(ts > 0, jnp.asarray(factor, dtype) @ noise, 0.0)
    if kind == "I":
        hurst = valid_index(jnp.asarray(hurst, dtype))
        factor = _factor(increment_covariance(hurst, ts, jnp), jnp)
        return jnp.cumsum(jnp.where(ts > 0, factor @ noise, 0.0))
    factor = _factor(fbm_covariance(hurst, ts[:, None], ts[None, :], kind), jnp)
    return jnp.where(ts > 0, factor @ noise, 0.0)


def _check_memory(num: int, kind: str) -> None:
    """Refuse as many times as would not fit in memory."""
    hint = "Use the default method, 'davies_harte', for equal spacing; `genkit.sde.simulate` takes any times."
    if kind == "II":
        hint = "`genkit.sde.simulate` with `ma_fbm(kind='II')` takes any number of times."
    check_bytes("ts", 8 * _MATRICES * num**2, f"{num:,} times, whose covariance is factorized", hint)


def _host_factor(hurst: np.ndarray, ts: np.ndarray, kind: str) -> np.ndarray:
    try:
        if kind == "I":
            return np.cumsum(_factor(increment_covariance(hurst, ts, np), np), axis=0)
        return _factor(_host_kind_two(hurst, ts), np)
    except np.linalg.LinAlgError:
        check(False, "ts", "far enough apart for the covariance to be factorized in float64", f"{ts.size} times")
        raise


def _factor(cov: Numbers, xp: ModuleType) -> Numbers:
    """Cholesky factor, scaled to correlations; the jitter is at the level of rounding."""
    variance = xp.diagonal(cov)
    # B(0) = 0 has no variance: give it a unit one, the caller zeroes it afterwards.
    still = variance == 0
    scale = xp.sqrt(xp.where(still, 1.0, variance))
    jitter = xp.where(still, 1.0, 8 * float(xp.finfo(cov.dtype).eps)).astype(cov.dtype)
    corr = cov / (scale[:, None] * scale[None, :]) + xp.diag(jitter)
    return xp.where(still, 0.0, scale)[:, None] * xp.linalg.cholesky(corr)


def increment_covariance(hurst: Numbers, ts: Numbers, xp: ModuleType) -> Numbers:
    """Covariance of B(ts[0]) and the increments that follow (kind I), first differences of powers taken by expm1.

    The factor of the values is the cumulative sum of the factor of the increments, whose condition is far better.
    """
    p = 2 * hurst
    ends = xp.concatenate([xp.zeros(1, ts.dtype), ts])
    width = xp.diff(ends)
    # From the end of the earlier to the later.
    gap = xp.maximum(ends[:-1, None] - ends[None, 1:], 0.0)

    def growth(x: Numbers) -> Numbers:
        """(x + width) ** p - x ** p."""
        safe = xp.where(x > 0, x, 1.0)
        w = width[:, None]
        grown = xp.exp(p * xp.log(safe)) * xp.expm1(p * xp.log1p(w / safe))
        return xp.where(x > 0, grown, xp.where(w > 0, xp.exp(p * xp.log(xp.where(w > 0, w, 1.0))), 0.0))

    lower = xp.tril((growth(gap + width[None, :]) - growth(gap)) / 2, -1)
    variance = xp.where(width > 0, xp.exp(p * xp.log(xp.where(width > 0, width, 1.0))), 0.0)
    return lower + lower.T + xp.diag(variance)


def _host_kind_two(h: np.ndarray, ts: np.ndarray) -> np.ndarray:
    lo = np.minimum(ts[:, None], ts[None, :])
    hi = np.maximum(ts[:, None], ts[None, :])
    hi = np.where(hi > 0, hi, 1.0)
    log_scale = np.log(2 * h) + special.gammaln(h + 0.5) - special.gammaln(h + 1.5)
    rows, columns = np.tril_indices(ts.size, -1)
    x = lo[rows, columns]
    y = hi[rows, columns]
    cov = np.diag(ts ** (2 * h))
    values = np.exp(log_scale) * x ** (h + 0.5) * y ** (h - 0.5) * special.hyp2f1(0.5 - h, 1.0, h + 1.5, x / y)
    cov[rows, columns] = values
    cov[columns, rows] = values
    return cov


def _davies_harte(hurst: ArrayLike, num: int, key: Array) -> Array:
    if num == 0:
        return jnp.zeros(0)
    r = fgn_autocovariance(hurst, num + 1)
    row = jnp.concatenate([r, r[-2:0:-1]])
    # Non-negative in exact arithmetic for every H (Craigmile 2003); the clip removes rounding below zero.
    eigenvalues = jnp.maximum(jnp.fft.rfft(row).real, 0.0)
    size = row.shape[0]
    white = jr.normal(key, (size,), r.dtype)
    return jnp.fft.irfft(jnp.sqrt(eigenvalues) * jnp.fft.rfft(white), size)[:num]


def _hosking(hurst: ArrayLike, num: int, key: Array) -> Array:
    """With a known index, its predictors come from float64: as H -> 1 their errors are below rounding in float32."""
    if num == 0:
        return jnp.zeros(0)
    index = on_host(hurst)
    r = fgn_autocovariance(hurst, num + 1)
    white = jr.normal(key, (num,), r.dtype)
    given = None
    if index is not None:
        reflections, deviations = _reflections(index.astype(np.float64), num)
        given = (jnp.asarray(reflections, r.dtype), jnp.asarray(deviations, r.dtype))

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        state, past = carry
        k, known = inputs
        if known is None:
            state = levinson_step(state, k, r)
            deviation = jnp.sqrt(state.variance)
        else:
            reflection, deviation = known
            state = levinson_update(state, k, reflection)
        value = jnp.sum(state.forward * past) + deviation * white[k]
        return (state, jnp.roll(past, 1).at[0].set(value)), value

    past = jnp.zeros(num, r.dtype).at[0].set(white[0])
    _, rest = jax.lax.scan(body, (levinson_start(r), past), (jnp.arange(1, num), given))
    return jnp.concatenate([white[:1], rest])


def _reflections(hurst: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Partial autocorrelations of fractional Gaussian noise at lags 1 to num - 1, sd of the prediction errors."""
    p = 2 * hurst
    k = np.arange(2.0, num)
    far = k**p * (np.expm1(p * np.log1p(1 / k)) + np.expm1(p * np.log1p(-1 / k))) / 2
    r = np.concatenate([[1.0, 2 ** (p - 1) - 1], far])
    forward = np.zeros(0)
    variance = 1.0
    reflections = np.zeros(num - 1)
    deviations = np.zeros(num - 1)
    for lag in range(1, num):
        reflection = (r[lag] - forward @ r[lag - 1 : 0 : -1]) / variance
        forward = np.append(forward - reflection * forward[::-1], reflection)
        variance *= 1 - reflection**2
        reflections[lag - 1] = reflection
        deviations[lag - 1] = np.sqrt(variance)
    return reflections, deviations
