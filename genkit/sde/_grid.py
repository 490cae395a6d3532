"""The time grid of a run and, per distinct step, the exact joint distribution of the lifted noise over it."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genkit._core._checks import check, check_count, check_positive, is_concrete
from genkit.noise import HURST_RANGE, Lift
from genkit.sde._model import FractionalSDE
from genkit.sde._observed import check_times


MAX_STEPS = 100_000_000  # the tables on the host would take gigabytes


class Grid(eqx.Module):
    """Steps from time 0: start and length of each, and after how many steps each requested time is reached."""

    t: Any  # (N,) physical start
    h: Any  # (N,) physical length
    kind: Any  # (N,) which distinct step, an index into `distinct`
    distinct: Any  # (U,) physical lengths
    slots: tuple[int, ...] = eqx.field(static=True)  # (n,) in 0..N

    @property
    def num_steps(self) -> int:
        return self.h.shape[0]


class StepTable(NamedTuple):
    """Per distinct step, leading axis U; columns are the standard normals drawn for it (see `columns`).

    NumPy arrays when the steps and the horizon are known, so that they are never traced; else traced ones.
    """

    u: Any  # () length on the unit clock
    loss: Any  # (K,) expm1(-gamma u)
    mean: Any  # (K,) integral of exp(-gamma v) over the step
    lag: Any  # (K,) u - mean
    mean2: Any  # (K,) the same integrated twice: of (u - v) exp(-gamma v)
    lag2: Any  # (K,) u^2 / 2 - mean2
    noise: Any  # (K, R) end value of the processes started at 0
    brownian: Any  # (R,) increment of W
    integral: Any  # (K, R) time integral of those processes
    integral2: Any  # (K, R) their double time integral, as far as the normals determine it


class Noises(eqx.Module):
    """The tables of a grid, and which of the K + 1 normals per step they use."""

    table: StepTable
    columns: tuple[int, ...] = eqx.field(static=True)


def make_grid(
    sde: FractionalSDE, ts: Any, max_step: Any = None, steps_per_interval: int | None = None, name: str = "ts"
) -> Grid:
    """Lay out the steps: every requested time is a boundary, none is longer than `max_step`."""
    check_times(name, ts)
    check(max_step is None or steps_per_interval is None, "max_step", "None with steps_per_interval", max_step)
    if steps_per_interval is not None:
        check_count("steps_per_interval", steps_per_interval)
    if max_step is not None:
        check_positive("max_step", max_step)
        if is_concrete(sde.horizon):
            horizon = float(sde.horizon)
            hint = "The horizon is too small for this step."
            check(
                float(max_step) <= horizon * (1 + 1e-6), "max_step", f"at most horizon = {horizon:.6g}", max_step, hint
            )
    check_inside(sde, ts, name)
    if not is_concrete(ts):
        hint = "Under jit pass `steps_per_interval` (a Python integer) instead, or close over the times."
        check(max_step is None, "max_step", "None when the times are traced", max_step, hint)
        return _traced_grid(sde, ts, steps_per_interval or 1)
    times = np.asarray(ts, np.float64)
    knots = times if times[0] == 0 else np.concatenate([[0.0], times])
    gaps = np.diff(knots)
    if max_step is None:
        counts = np.full(gaps.shape, steps_per_interval or 1)
    else:
        counts = np.maximum(1, np.ceil(gaps / float(max_step) - 1e-6))
        total = f"one that makes {counts.sum():.3g}"
        check(counts.sum() <= MAX_STEPS, "max_step", f"long enough for at most {MAX_STEPS:,} steps", total)
        counts = counts.astype(int)
    ends = np.cumsum(counts)
    slots = np.concatenate([[0], ends]) if times[0] == 0 else ends
    h = np.repeat(gaps / counts, counts)
    t = np.repeat(knots[:-1], counts) + h * (np.arange(h.size) - np.repeat(ends - counts, counts))
    # Lengths equal up to the rounding of float32 times are one step, so that a uniform grid has one table.
    eps = np.finfo(np.asarray(ts).dtype).eps if np.issubdtype(np.asarray(ts).dtype, np.floating) else 0.0
    scale = max(1e-9 * h.max(), 4 * eps * times[-1]) if h.size else 1.0
    _, first, kind = np.unique(np.rint(h / scale / 4), return_index=True, return_inverse=True)
    # Without any step (time 0 alone) there is still a table of one, so that shapes are as ever.
    unit = float(sde.horizon) if is_concrete(sde.horizon) else 1.0
    distinct = np.array([h[kind == i].mean() for i in range(first.size)] if h.size else [unit])
    grid = Grid(t, distinct[kind] if h.size else h, kind, distinct, tuple(slots.tolist()))
    _check_hurst(sde, grid)
    return grid


def check_inside(sde: FractionalSDE, ts: Any, name: str) -> None:
    """Refuse times beyond the horizon."""
    if is_concrete(ts) and is_concrete(sde.horizon):
        last, horizon = float(np.asarray(ts)[-1]), float(sde.horizon)
        check(last <= horizon * (1 + 1e-5), name, f"inside the horizon [0, {horizon:.6g}]", f"{name}[-1] = {last:.6g}")


def _check_hurst(sde: FractionalSDE, grid: Grid) -> None:
    """Refuse a Hurst function that leaves the lift's range at a time the steps look at."""
    if not sde.varying or not grid.num_steps:
        return
    times = np.concatenate([grid.t, grid.t + grid.h / 2, grid.t + grid.h])
    values = jax.vmap(sde.hurst_at)(jnp.asarray(times, sde.dtype))
    if is_concrete(values):
        rows = np.asarray(values).reshape(times.size, -1)
        (lo, hi), slack = HURST_RANGE, 1e-6
        bad = ~((rows >= lo - slack) & (rows <= hi + slack)).all(axis=1)
        first = times == times[bad].min(initial=np.inf)
        got = f"{rows[first][:1].squeeze()} at t = {times[first][:1].squeeze():.6g}" if bad.any() else ""
        check(not bad.any(), "hurst", f"in [{lo}, {hi}] at every step", got)


def _traced_grid(sde: FractionalSDE, ts: Array, substeps: int) -> Grid:
    ts = ts.astype(sde.dtype)
    knots = jnp.concatenate([jnp.zeros(1, ts.dtype), ts])
    h = jnp.repeat(jnp.diff(knots) / substeps, substeps)
    t = jnp.repeat(knots[:-1], substeps) + h * jnp.tile(jnp.arange(substeps, dtype=ts.dtype), ts.shape[0])
    slots = tuple(substeps * i for i in range(1, ts.shape[0] + 1))
    return Grid(t, h, np.arange(h.shape[0]), h, slots)


def phi1(x: Any, xp: Any = jnp) -> Any:
    """(1 - exp(-x)) / x, smooth at 0, for x of either sign."""
    small = xp.abs(x) < 1e-4
    safe = xp.where(small, 1.0, x)
    return xp.where(small, 1 - x / 2 + x * x / 6, -xp.expm1(-safe) / safe)


def _phi2(x: Any, xp: Any) -> Any:
    """(1 - phi1(x)) / x without cancellation."""
    small = xp.abs(x) < 0.05
    safe = xp.where(small, 1.0, x)
    series = (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7))))) / 2
    return xp.where(small, series, (1 + xp.expm1(-safe) / safe) / safe)


def _phi3(x: Any, xp: Any) -> Any:
    """(1/2 - phi2(x)) / x without cancellation."""
    small = xp.abs(x) < 0.2
    safe = xp.where(small, 1.0, x)
    series = (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8 * (1 - x / 9)))))) / 6
    return xp.where(small, series, (0.5 - _phi2(safe, xp)) / safe)


@functools.cache
def pivots(lift: Lift) -> tuple[int, ...]:
    """Order in which the Brownian increment (first) and the processes are factorized: greedy at a middling step."""
    rates = np.concatenate([[0.0], lift.gamma])
    corr = _correlation(rates, np.array(0.05), np)
    order = [0]
    residual = corr - np.outer(corr[0], corr[0])
    for _ in range(rates.size - 1):
        diag = np.where(np.isin(np.arange(rates.size), order), -1.0, np.diagonal(residual))
        j = int(np.argmax(diag))
        order.append(j)
        if residual[j, j] > 1e-13:
            residual = residual - np.outer(residual[j], residual[j]) / residual[j, j]
    return tuple(order)


def _correlation(rates: Any, u: Any, xp: Any) -> Any:
    """Correlations of int exp(-rate_i (u - v)) dW(v) over a step of length u (batched)."""
    x = u[..., None] * rates
    own = xp.sqrt(phi1(2 * x, xp))
    return phi1(x[..., :, None] + x[..., None, :], xp) / (own[..., :, None] * own[..., None, :])


def _factor(corr: Any, order: tuple[int, ...], tolerance: float, xp: Any) -> Any:
    """Cholesky factor in a fixed order (so that it is continuous in the step), dropping what is determined already.

    Rows beyond the square are those of other variables, known by their correlations: they get the loadings of their
    conditional expectation.
    """
    residual, columns = corr, []
    num = corr.shape[-1]
    for j in order:
        pivot = residual[..., j, j]
        keep = pivot > tolerance
        root = xp.sqrt(xp.where(keep, pivot, 1.0))
        column = xp.where(keep[..., None], residual[..., :, j] / root[..., None], 0.0)
        columns.append(column)
        residual = residual - column[..., :, None] * column[..., None, :num]
    return xp.stack(columns, axis=-1)


def _double_integrals(rates: Any, u: Any, xp: Any) -> Any:
    """Covariances (..., K, K + 1) of the processes' double time integrals over a step with all of their end values."""
    nodes, weights = panels()
    v = u[..., None] * (nodes if xp is np else jnp.asarray(nodes, rates.dtype))
    x = v[..., None] * rates
    kernel = v[..., None] ** 2 * _phi2(x[..., 1:], xp) * (u[..., None] * xp.asarray(weights, rates.dtype))[..., None]
    return xp.swapaxes(kernel, -1, -2) @ xp.exp(-x)


def make_table(sde: FractionalSDE, grid: Grid) -> Noises:
    """The tables of a grid and the columns (normals) it uses; in float64 on the host when the clock is known.

    Columns of negligible variance are dropped when the steps are known; each column has its own stream of normals,
    so that dropping one changes no other draw.
    """
    known = is_concrete(sde.horizon) and is_concrete(grid.distinct)
    xp = np if known else jnp
    u = np.asarray(grid.distinct, np.float64) / float(sde.clock) if known else grid.distinct / sde.clock
    lift = sde.lift
    rates = np.concatenate([[0.0], lift.gamma])
    rates = rates if known else jnp.asarray(rates, sde.dtype)
    tolerance = 1e-12 if sde.dtype == jnp.float64 else 1e-6
    order = pivots(lift)
    scale = xp.sqrt(u[..., None] * phi1(2 * u[..., None] * rates, xp))
    twice = _double_integrals(rates, u, xp) / xp.where(scale > 0, scale, 1.0)[..., None, :]
    unit = _factor(xp.concatenate([_correlation(rates, u, xp), twice], axis=-2), order, tolerance, xp)
    rows, integral2 = unit[..., : rates.size, :] * scale[..., None], unit[..., rates.size :, :]
    columns = tuple(j for j in range(len(order)) if not known or np.abs(rows[..., j]).max(initial=0.0) > 0)
    rows, integral2 = rows[..., list(columns)], integral2[..., list(columns)]
    gamma, x = rates[1:], u[..., None] * rates[1:]
    brownian, noise = rows[..., 0, :], rows[..., 1:, :]
    integral = (brownian[..., None, :] - noise) / gamma[:, None]
    length = u[..., None]
    mean, lag = length * phi1(x, xp), length * x * _phi2(x, xp)
    mean2, lag2 = length**2 * _phi2(x, xp), length**2 * x * _phi3(x, xp)
    table = StepTable(u, xp.expm1(-x), mean, lag, mean2, lag2, noise, brownian, integral, integral2)
    if known:
        return Noises(StepTable(*(np.asarray(v, sde.dtype) for v in table)), columns)
    return Noises(table, columns)


@functools.cache
def panels(num_panels: int = 22, num_nodes: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on (0, 1), graded towards 0 where fast processes live."""
    edges = np.concatenate([[0.0], np.geomspace(1e-6, 1.0, num_panels)])
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    left, width = edges[:-1, None], np.diff(edges)[:, None]
    return (left + width * (nodes + 1) / 2).ravel(), (width * weights / 2).ravel()
