"""One time step of the state (x, v): the lifted noise exactly, the equation to second order or exactly."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genkit.sde._grid import Grid, Noises, StepTable, panels, phi1, pivots
from genkit.sde._model import FractionalSDE


class Driver(eqx.Module):
    """The noise of one model on one grid.

    The lifted state v has m entries per coordinate: with a constant Hurst index the K weighted processes, with the
    history as their start, so that dB = sum_k dv_k; with a varying one the K plain processes and the r coordinates of
    the history, so that B = alpha(t) . v.
    """

    table: StepTable  # leading axis U
    gain: Array  # (d, m) of W on v
    direct: Array  # () weight of W on B: the Brownian lift
    start: Array  # (d, m, r) initial v from the history's normals
    alpha: tuple[Array, Array, Array] | None  # each (N, d, m): at the start, the middle and the end of a step
    exact: tuple[Array, Array, Array, Array] | None  # rows (U, d, R), residual (U, d), pull (U, d, m), rate (d,)
    columns: tuple[int, ...] = eqx.field(static=True)

    @property
    def num_normals(self) -> int:
        """Standard normals per coordinate and step."""
        return len(self.columns) + (self.exact is not None)


class Noise(NamedTuple):
    """What the normals of a step amount to, per coordinate."""

    v: Array  # (d, m) added to v
    area: Array  # (d,) time integral (unit clock) of the noise in B since the start of the step
    area2: Array  # (d,) its double time integral
    brownian: Array  # (d,) increment of B that comes from W directly
    affine: Array  # (d,) the stochastic convolution of the exact step


class Means(NamedTuple):
    """Means of B over a step since its start, (d,)."""

    plain: Array
    early: Array  # with weights that fall linearly to 0
    lead: Array  # half of `early`; three quarters for the Brownian lift, whose path within the step is not drawn


class Step(NamedTuple):
    """Inputs of one step; leading axis N (or a block) when stacked."""

    t: Array
    h: Array
    kind: Array
    alpha: tuple[Array, Array, Array] | None


def make_driver(sde: FractionalSDE, grid: Grid, noises: Noises) -> Driver:
    """Everything about the noise that does not depend on the state."""
    table, columns = jax.tree.map(jnp.asarray, noises.table), noises.columns
    d = sde.dim
    if sde.lift.num_terms == 0:
        empty = jnp.zeros((d, 0), sde.dtype)
        direct = jnp.sqrt(sde.clock)
        start = jnp.zeros((d, 0, 0), sde.dtype)
        driver = Driver(table, empty, direct, start, None, None, columns)
    elif sde.varying:
        driver = _varying_driver(sde, grid, table, columns)
    else:
        hurst = jnp.broadcast_to(sde.hurst_at(0.0), (d,))
        scale = (sde.clock**hurst)[:, None]
        start = -scale[..., None] * sde.lift.history(hurst)
        gain = (scale * sde.lift.weights(hurst)).astype(sde.dtype)
        zero = jnp.zeros((), sde.dtype)
        driver = Driver(table, gain, zero, start.astype(sde.dtype), None, None, columns)
    if sde.step != "exact":
        return driver
    return dataclasses.replace(driver, exact=_exact_rows(sde, driver))


def _varying_driver(sde: FractionalSDE, grid: Grid, table: StepTable, columns: tuple[int, ...]) -> Driver:
    """Multifractional noise B(t) = T^H(t) [omega(H(t)) . Y(t) + phi(t) . F(H(t)) xi]."""
    d, k, r = sde.dim, sde.lift.num_terms, sde.lift.history_rank
    gamma = jnp.asarray(sde.lift.gamma, sde.dtype)

    def weights(t: Array) -> Array:
        hurst = jnp.broadcast_to(sde.hurst_at(t), (d,))
        past = -jnp.expm1(-gamma * t / sde.clock)
        rows = [sde.lift.weights(hurst), jnp.einsum("k,dkr->dr", past, sde.lift.history(hurst))]
        return (sde.clock**hurst)[:, None] * jnp.concatenate(rows, axis=-1)

    t, h = jnp.asarray(grid.t, sde.dtype), jnp.asarray(grid.h, sde.dtype)
    at = lambda s: jax.vmap(weights)(s).astype(sde.dtype)
    alpha = (at(t), at(t + h / 2), at(t + h))
    gain = jnp.concatenate([jnp.ones((d, k)), jnp.zeros((d, r))], axis=-1).astype(sde.dtype)
    start = jnp.concatenate([jnp.zeros((k, r)), jnp.eye(r)]).astype(sde.dtype)
    # The history's coordinates stand still: no loss, integral u, no noise.
    u = table.u[:, None]
    still = jnp.zeros((u.shape[0], r), sde.dtype)
    rows = jnp.zeros((u.shape[0], r, table.noise.shape[-1]), sde.dtype)
    table = table._replace(
        loss=jnp.concatenate([table.loss, still], -1),
        mean=jnp.concatenate([table.mean, still + u], -1),
        lag=jnp.concatenate([table.lag, still], -1),
        mean2=jnp.concatenate([table.mean2, still + u**2 / 2], -1),
        lag2=jnp.concatenate([table.lag2, still], -1),
        noise=jnp.concatenate([table.noise, rows], -2),
        integral=jnp.concatenate([table.integral, rows], -2),
        integral2=jnp.concatenate([table.integral2, rows], -2),
    )
    start = jnp.broadcast_to(start, (d, k + r, r))
    return Driver(table, gain, jnp.zeros((), sde.dtype), start, alpha, None, columns)


def make_steps(sde: FractionalSDE, driver: Driver, grid: Grid) -> Step:
    """The inputs of all steps, stacked."""
    t, h = jnp.asarray(grid.t, sde.dtype), jnp.asarray(grid.h, sde.dtype)
    return Step(t, h, jnp.asarray(grid.kind, jnp.int32), driver.alpha)


def pick(driver: Driver, kind: Array) -> tuple[StepTable, tuple | None]:
    """The tables of one step (or of several); closed over when there is only one length of step."""
    index = 0 if driver.table.u.shape[0] == 1 else kind
    take = lambda x: x[index]
    exact = None if driver.exact is None else (*map(take, driver.exact[:3]), driver.exact[3])
    return jax.tree.map(take, driver.table), exact


def shape_noise(driver: Driver, step: Step, eps: Array) -> Noise:
    """From standard normals (d, R) to the noise of one step."""
    table, exact = pick(driver, step.kind)
    white = eps[:, : len(driver.columns)]
    end = driver.gain * (white @ table.noise.T)
    load = driver.gain if step.alpha is None else step.alpha[1] * driver.gain
    area, area2 = (jnp.sum(load * (white @ rows.T), axis=-1) for rows in (table.integral, table.integral2))
    brownian = driver.direct * (white @ table.brownian)
    affine = jnp.zeros_like(area)
    if exact is not None:
        affine = jnp.sum(exact[0] * white, axis=-1) + exact[1] * eps[:, -1]
    return Noise(end, area, area2, brownian, affine)


def advance(sde: FractionalSDE, driver: Driver, step: Step, x: Array, v: Array, noise: Noise) -> tuple[Array, Array]:
    """One step of (x, v), shapes (d,) and (d, m)."""
    dx, dv = change(sde, driver, step, x, v, noise)
    return x + dx, v + dv


def change(sde: FractionalSDE, driver: Driver, step: Step, x: Array, v: Array, noise: Noise) -> tuple[Array, Array]:
    """What one step adds to (x, v)."""
    table, exact = pick(driver, step.kind)
    dv = table.loss * v + noise.v
    t, h = step.t, step.h
    if exact is not None:
        rate = exact[3]
        forcing = sde.drift(t, jnp.zeros_like(x))
        s = jnp.broadcast_to(sde.diffusion(t, x), x.shape)
        relaxed = h * phi1(rate * h) * (forcing - rate * x)
        return relaxed + s * (noise.affine - jnp.sum(exact[2] * v, axis=-1)), dv
    if step.alpha is None:
        increment = jnp.sum(dv, axis=-1) + noise.brownian
        area, area2 = noise.area - jnp.sum(table.lag * v, axis=-1), noise.area2 - jnp.sum(table.lag2 * v, axis=-1)
    else:
        before, middle, after = step.alpha
        increment = jnp.sum(after * (v + dv) - before * v, axis=-1) + noise.brownian
        area = noise.area + jnp.sum((middle * table.mean - before * table.u) * v, axis=-1)
        area2 = noise.area2 + jnp.sum((middle * table.mean2 - before * table.u**2 / 2) * v, axis=-1)
    # For the Brownian lift, expectations given the increment.
    u = jnp.where(table.u > 0, table.u, 1.0)
    means = Means(
        area / u + noise.brownian / 2, 2 * area2 / u**2 + noise.brownian / 3, area2 / u**2 + noise.brownian / 4
    )
    return _heun(sde, t, h, x, increment, means), dv


def _heun(sde: FractionalSDE, t: Array, h: Array, x: Array, increment: Array, means: Means) -> Array:
    """Change of x in a Stratonovich step: the drift at the path's own middle, the diffusion averaged over the ends.

    Two drift calls cannot follow the decay 1 - q h + (q h)^2 / 2 - ... of a linear drift -q x beyond second order. The
    noise in the first call is chosen to make up for that: with `means.lead` the stationary variance under Brownian
    noise is right to third order. (None there is too little noise; the whole of `means.early`, right for a drift whose
    decay is right, too much.)
    """
    s = jnp.broadcast_to(sde.diffusion(t, x), x.shape)
    b = sde.drift(t, x + s * means.lead)
    s_end = jnp.broadcast_to(sde.diffusion(t + h, x + h * b + s * increment), x.shape)
    s_mean = (s + s_end) / 2
    if sde.step == "path_mean":
        middle = x + h / 2 * b + s * means.plain
        return h * sde.drift(t + h / 2, middle) + s_mean * increment
    rate = -jnp.diagonal(jax.jacfwd(lambda x: sde.drift(t, x))(x))
    middle = x + h / 2 * phi1(rate * h / 2) * b + s * means.plain
    pull = sde.drift(t + h / 2, middle) + rate * (middle - x)
    # int exp(-rate (h - r)) dB = increment - rate int exp(-rate (h - r)) B dr; the weight is taken affine in r, so
    # that a constant and a linear B come out exactly.
    decay, ramp = phi1(rate * h), _kappa(rate * h)
    weighted = (3 * ramp - 2 * decay) * means.plain + 3 * (decay - ramp) * means.early
    return h * decay * pull + s_mean * (increment - rate * h * weighted)


def _kappa(x: Array) -> Array:
    """2 (x - 1 + exp(-x)) / x^2: weight of the path's mean in the exponentially weighted mean of a linear path."""
    small = jnp.abs(x) < 1e-2
    safe = jnp.where(small, 1.0, x)
    series = 1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6)))
    return jnp.where(small, series, 2 * (1 - phi1(safe)) / safe)


def affine_parts(sde: FractionalSDE, t: Any = 0.0) -> tuple[Array, Array, Array]:
    """Jacobian (d, d) and value at 0 (d,) of the drift, diffusion (d,), all at time `t` and state 0."""
    zero, t = jnp.zeros(sde.dim, sde.dtype), jnp.asarray(t, sde.dtype)
    jacobian, forcing = jax.jacfwd(lambda x: sde.drift(t, x))(zero), sde.drift(t, zero)
    return jacobian, forcing, jnp.broadcast_to(sde.diffusion(t, zero), (sde.dim,))


def _exact_rows(sde: FractionalSDE, driver: Driver) -> tuple[Array, Array, Array, Array]:
    """The convolution int exp(-q (h - r)) dB of a step, expressed in the step's normals plus one more.

    Its kernel is projected on the orthonormal functions behind the normals; what is left over is one independent
    normal, its variance the integral of the squared remainder (never negative, smooth in q, H and the weights).
    """
    rate = -jnp.diagonal(affine_parts(sde)[0])
    gamma = jnp.asarray(sde.lift.gamma, sde.dtype)
    q = rate * sde.clock
    unit_nodes, unit_weights = (jnp.asarray(a, sde.dtype) for a in panels())

    def response(v: Array) -> tuple[Array, Array]:
        """Kernel of int exp(-q (v - r)) dv_k per unit of W, and the pull of the process' own start, (d, K) each."""
        both = jnp.minimum(q[:, None], gamma)
        mixed = v * jnp.exp(-both * v) * phi1(jnp.abs(q[:, None] - gamma) * v)
        return jnp.exp(-q * v)[:, None] - gamma * mixed, gamma * mixed

    def rows(u: Array, noise: Array, brownian: Array) -> tuple[Array, Array, Array]:
        nodes, weights = u * unit_nodes, u * unit_weights
        kernel = jax.vmap(lambda v: jnp.sum(driver.gain * response(v)[0], -1) + driver.direct * jnp.exp(-q * v))(nodes)
        functions = _orthonormal(sde, driver.columns, nodes, noise, brownian)
        row = (kernel * weights[:, None]).T @ functions
        rest = kernel - functions @ row.T
        tiny = jnp.finfo(sde.dtype).tiny ** 0.5  # keeps the root differentiable where nothing is left over
        return row, jnp.sqrt(weights @ rest**2 + tiny), response(u)[1]

    parts = jax.vmap(rows)(driver.table.u, driver.table.noise, driver.table.brownian)
    return (*parts, rate)


def _orthonormal(sde: FractionalSDE, columns: tuple[int, ...], nodes: Array, noise: Array, brownian: Array) -> Array:
    """The functions e_j with (row of a process) = int exp(-rate v) e_j(v) dv: back-substitution through the factor."""
    order = pivots(sde.lift)
    rates = jnp.asarray(np.concatenate([[0.0], sde.lift.gamma]), sde.dtype)
    plain = jnp.exp(-nodes[:, None] * rates)
    loadings = jnp.concatenate([brownian[None], noise])  # (K + 1, R), lower triangular in the order of the pivots
    functions: list[Array] = []
    for j, column in enumerate(columns):
        row = loadings[order[column]]
        remainder = plain[:, order[column]]
        for i, function in enumerate(functions):
            remainder = remainder - row[i] * function
        size = row[j]
        functions.append(jnp.where(size > 0, remainder / jnp.where(size > 0, size, 1.0), 0.0))
    return jnp.stack(functions, axis=-1)
