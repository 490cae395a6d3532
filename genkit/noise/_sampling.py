"""Exact samples of fractional Brownian motion: Davies-Harte, Hosking, Cholesky."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
from scipy import special

from genkit._core._checks import check, check_choice, check_interval, check_key, is_concrete

from ._covariance import KINDS, fbm_covariance, fgn_autocovariance, valid_index
from ._likelihood import levinson_start, levinson_step, levinson_update


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
    method = method or ("davies_harte" if kind == "I" else "cholesky")
    check_choice("method", method, ("davies_harte", "hosking", "cholesky"))
    check(
        kind == "I" or method == "cholesky",
        "method",
        "'cholesky' for kind 'II', whose increments are not stationary",
        repr(method),
    )
    check_times("ts", ts)
    if method == "cholesky":
        return _cholesky(hurst, ts, kind, key)
    spacing, slots = _equal_spacing(ts, method)
    draw = _davies_harte if method == "davies_harte" else _hosking
    noise = draw(hurst, int(slots[-1]), key)
    path = jnp.concatenate([jnp.zeros(1, noise.dtype), jnp.cumsum(noise)])
    return spacing ** jnp.asarray(hurst, path.dtype) * path[slots]


def check_times(name: str, ts: ArrayLike) -> None:
    """Refuse times that are not one-dimensional, increasing and non-negative."""
    check(jnp.ndim(ts) == 1 and jnp.size(ts) >= 1, name, "times of shape (n,)", f"shape {jnp.shape(ts)}")
    check_interval(name, ts, 0)
    if is_concrete(ts):
        gaps = np.diff(np.asarray(ts))
        bad = int(np.argmin(gaps)) if gaps.size else 0
        ok = gaps.size == 0 or bool((gaps > 0).all())
        why = "" if ok else f"{name}[{bad}] = {np.asarray(ts)[bad]} then {np.asarray(ts)[bad + 1]}"
        check(ok, name, "strictly increasing", why, "Sort the times and drop duplicates.")


def _equal_spacing(ts: ArrayLike, method: str) -> tuple[float, np.ndarray]:
    """The spacing of `ts` and its integer multiples, or an error saying which method takes any times."""
    hint = "Use method='cholesky' for irregular times."
    check(is_concrete(ts), "ts", f"concrete under method={method!r}", "a traced array", hint)
    times = np.asarray(ts, np.float64)
    if times.size == 1:
        return float(times[0]) or 1.0, np.array([int(times[0] > 0)])
    spacing = (times[-1] - times[0]) / (times.size - 1)
    slots = np.rint(times / spacing).astype(int)
    # float32 grids carry rounding of a few units in the last place of the largest time
    given = np.asarray(ts).dtype
    eps = np.finfo(given).eps if np.issubdtype(given, np.floating) else 0.0
    tolerance = 1e-5 * spacing + 4 * eps * times[-1]
    worst = float(np.max(np.abs(times - slots * spacing)))
    regular = worst <= tolerance and bool((np.diff(slots) == 1).all())
    found = f"times off the grid of spacing {spacing:.6g} by up to {worst:.3g}"
    check(regular, "ts", f"equally spaced from a multiple of the spacing under method={method!r}", found, hint)
    return float(spacing), slots


def _cholesky(hurst: ArrayLike, given: ArrayLike, kind: str, key: Array) -> Array:
    """With index and times known the factor comes from float64: float32 cannot tell late times apart."""
    known = is_concrete(hurst) and is_concrete(given)  # before conversion, which a program may stage
    ts = jnp.asarray(given, jnp.result_type(float, jnp.asarray(given)))
    noise = jr.normal(key, ts.shape, ts.dtype)
    if known:
        factor = jnp.asarray(_host_factor(np.asarray(hurst, np.float64), np.asarray(given, np.float64), kind), ts.dtype)
    elif kind == "I":
        factor = _factor(increment_covariance(valid_index(jnp.asarray(hurst, ts.dtype)), ts, jnp), jnp)
    else:
        factor = _factor(fbm_covariance(hurst, ts[:, None], ts[None, :], kind), jnp)
    values = jnp.where(ts > 0, factor @ noise, 0.0)
    return values if known or kind == "II" else jnp.cumsum(values)


def _host_factor(hurst: np.ndarray, ts: np.ndarray, kind: str) -> np.ndarray:
    try:
        if kind == "I":
            return np.cumsum(_factor(increment_covariance(hurst, ts, np), np), axis=0)
        return _factor(_host_kind_two(hurst, ts), np)
    except np.linalg.LinAlgError:
        check(False, "ts", "far enough apart for the covariance to be factorised in float64", f"{ts.size} times")
        raise


def _factor(cov: Any, xp: Any) -> Any:
    """Cholesky factor, scaled to correlations; the jitter is at the level of rounding."""
    variance = xp.diagonal(cov)
    still = variance == 0  # B(0) = 0 has no variance: give it a unit one, the caller zeroes it afterwards
    scale = xp.sqrt(xp.where(still, 1.0, variance))
    eye = xp.eye(cov.shape[0], dtype=cov.dtype)
    corr = cov / (scale[:, None] * scale[None, :]) + eye * xp.where(still, 1.0, 8 * xp.finfo(cov.dtype).eps)
    return xp.where(still, 0.0, scale)[:, None] * xp.linalg.cholesky(corr)


def increment_covariance(hurst: Any, ts: Any, xp: Any) -> Any:
    """Covariance of B(ts[0]) and the increments that follow (kind I), first differences of powers taken by expm1.

    The factor of the values is the cumulative sum of the factor of the increments, whose condition is far better.
    """
    p = 2 * hurst
    ends = xp.concatenate([xp.zeros(1, ts.dtype), ts])
    width = xp.diff(ends)
    gap = xp.maximum(ends[:-1, None] - ends[None, 1:], 0.0)  # from the end of the earlier to the later

    def growth(x: Any) -> Any:
        """(x + width) ** p - x ** p."""
        safe, w = xp.where(x > 0, x, 1.0), width[:, None]
        grown = xp.exp(p * xp.log(safe)) * xp.expm1(p * xp.log1p(w / safe))
        return xp.where(x > 0, grown, xp.where(w > 0, xp.exp(p * xp.log(xp.where(w > 0, w, 1.0))), 0.0))

    lower = xp.tril((growth(gap + width[None, :]) - growth(gap)) / 2, -1)
    variance = xp.where(width > 0, xp.exp(p * xp.log(xp.where(width > 0, width, 1.0))), 0.0)
    return lower + lower.T + xp.diag(variance)


def _host_kind_two(h: np.ndarray, ts: np.ndarray) -> np.ndarray:
    lo, hi = np.minimum(ts[:, None], ts[None, :]), np.maximum(ts[:, None], ts[None, :])
    hi = np.where(hi > 0, hi, 1.0)
    log_scale = np.log(2 * h) + special.gammaln(h + 0.5) - special.gammaln(h + 1.5)
    rows, columns = np.tril_indices(ts.size, -1)
    x, y = lo[rows, columns], hi[rows, columns]
    cov = np.diag(ts ** (2 * h))
    values = np.exp(log_scale) * x ** (h + 0.5) * y ** (h - 0.5) * special.hyp2f1(0.5 - h, 1.0, h + 1.5, x / y)
    cov[rows, columns] = cov[columns, rows] = values
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
    r = fgn_autocovariance(hurst, num + 1)
    white = jr.normal(key, (num,), r.dtype)
    known = _reflections(np.asarray(hurst, np.float64), num) if is_concrete(hurst) else None

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        state, past = carry
        k, given = inputs
        state = levinson_step(state, k, r) if given is None else levinson_update(state, k, given[0])
        sd = jnp.sqrt(state.variance) if given is None else given[1]
        value = jnp.sum(state.forward * past) + sd * white[k]
        return (state, jnp.roll(past, 1).at[0].set(value)), value

    past = jnp.zeros(num, r.dtype).at[0].set(white[0])
    given = None if known is None else tuple(jnp.asarray(x, r.dtype) for x in known)
    _, rest = jax.lax.scan(body, (levinson_start(r), past), (jnp.arange(1, num), given))
    return jnp.concatenate([white[:1], rest])


def _reflections(hurst: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Partial autocorrelations of fractional Gaussian noise at lags 1 to num - 1, sd of the prediction errors."""
    p, k = 2 * hurst, np.arange(2.0, num)
    far = k**p * (np.expm1(p * np.log1p(1 / k)) + np.expm1(p * np.log1p(-1 / k))) / 2
    r = np.concatenate([[1.0, 2 ** (p - 1) - 1], far])
    forward, variance, out = np.zeros(0), 1.0, np.zeros((num - 1, 2))
    for lag in range(1, num):
        reflection = (r[lag] - forward @ r[lag - 1 : 0 : -1]) / variance
        forward = np.append(forward - reflection * forward[::-1], reflection)
        variance *= 1 - reflection**2
        out[lag - 1] = reflection, np.sqrt(variance)
    return out[:, 0], out[:, 1]
