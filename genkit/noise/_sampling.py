"""Exact samples of fractional Brownian motion: Davies-Harte, Hosking, Cholesky."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from genkit._core._checks import check, check_choice, check_interval, check_key, is_concrete

from ._covariance import KINDS, fbm_covariance, fgn_autocovariance
from ._likelihood import levinson_start, levinson_step


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
            starting at a multiple of it. `None` is "davies_harte" for kind I and "cholesky" for kind II.
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
        return _cholesky(hurst, jnp.asarray(ts, jnp.result_type(float, jnp.asarray(ts))), kind, key)
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


def _cholesky(hurst: ArrayLike, ts: Array, kind: str, key: Array) -> Array:
    positive = ts > 0  # B(0) = 0 has no variance; give it a unit one and zero it afterwards
    both = positive[:, None] & positive[None, :]
    cov = jnp.where(both, fbm_covariance(hurst, ts[:, None], ts[None, :], kind), jnp.eye(ts.shape[0], dtype=ts.dtype))
    # Scaled to correlations; the jitter keeps close times factorisable and is at the level of rounding.
    scale = jnp.sqrt(jnp.diagonal(cov))
    corr = cov / (scale[:, None] * scale[None, :]) + 8 * jnp.finfo(ts.dtype).eps * jnp.eye(ts.shape[0], dtype=ts.dtype)
    noise = jr.normal(key, ts.shape, ts.dtype)
    return jnp.where(positive, scale * (jnp.linalg.cholesky(corr) @ noise), 0.0)


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
    if num == 0:
        return jnp.zeros(0)
    r = fgn_autocovariance(hurst, num + 1)
    white = jr.normal(key, (num,), r.dtype)

    def body(carry: tuple, k: Array) -> tuple[tuple, Array]:
        state, past = carry
        state = levinson_step(state, k, r)
        value = jnp.sum(state.forward * past) + jnp.sqrt(state.variance) * white[k]
        return (state, jnp.roll(past, 1).at[0].set(value)), value

    past = jnp.zeros(num, r.dtype).at[0].set(white[0])
    _, rest = jax.lax.scan(body, (levinson_start(r), past), jnp.arange(1, num))
    return jnp.concatenate([white[:1], rest])
