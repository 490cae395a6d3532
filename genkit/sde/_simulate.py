"""Simulation: one scan over blocks of steps, about sqrt(N) each, their noise drawn per block, checkpointed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from genkit._core._checks import NonFiniteError, check, check_finite, check_key, is_concrete
from genkit.sde._affine import check_affine
from genkit.sde._grid import Grid, Noises, check_inside, make_grid, make_table
from genkit.sde._guide import AbstractGuide, LinearGuide, Plan
from genkit.sde._model import FractionalSDE
from genkit.sde._neural import NeuralGuide
from genkit.sde._observed import Observed
from genkit.sde._start import initial_state
from genkit.sde._step import Driver, Step, advance, make_driver, make_steps, shape_noise


class Paths(eqx.Module):
    """Simulated states, and under a guide how they weigh.

    Args:
        ts: the times, shape (n,).
        x: the states at these times, shape (n, d).
        log_weight: log-density ratio of the path under the model and under the guide, so that `exp(log_weight)` times
            the likelihood estimates the evidence; 0 without a guide.
        kl: the same in closed form per step, a non-negative estimate of the Kullback-Leibler divergence; 0 without.
    """

    ts: Any
    x: Array
    log_weight: Array
    kl: Array


class Run(eqx.Module):
    """A model laid out on a grid: all that does not depend on the draw."""

    sde: FractionalSDE
    driver: Driver
    steps: Step
    slots: tuple[int, ...] = eqx.field(static=True)


def make_run(sde: FractionalSDE, grid: Grid, noises: Noises) -> Run:
    """Step inputs of a grid."""
    driver = make_driver(sde, grid, noises)
    return Run(sde, driver, make_steps(sde, driver, grid), grid.slots)


def prepare(sde: FractionalSDE, guide: AbstractGuide | None, grid: Grid) -> tuple[Noises, Plan | None]:
    """What is done on the host before anything is compiled: checks, tables, a look at the guide's own plan."""
    affine = check_affine(sde, uncoupled=True) if sde.step == "exact" else True
    if guide is not None:
        sde.start()  # its errors name the distribution of x0
    noises = make_table(sde, grid)
    if not is_concrete(affine):  # inside jit, where nothing can be refused, a wrong step makes no plausible path
        noises = jax.tree.map(lambda x: jnp.where(affine, x, jnp.nan), noises)
    return noises, None if guide is None else guide.prepared_for(grid, noises)


def _normals(key: Array, num: int, run: Run) -> Array:
    """Standard normals (num, d, R); each column has a stream of its own, the exact step's extra one the last."""
    d, dtype = run.sde.dim, run.sde.dtype
    names = np.array([*run.driver.columns, *([10_000] if run.driver.exact is not None else [])])
    # One vectorized generator: a program with one per column takes several times longer to compile.
    draw = lambda c: jr.normal(jr.fold_in(key, c), (num, d), dtype)
    return jnp.moveaxis(jax.vmap(draw)(names), 0, -1)


def _block_sizes(num_steps: int) -> tuple[int, int, int]:
    """`(blocks, size, rest)`: a divisor of the step count near its root if there is one, else a shorter last block.

    The root balances the memory of gradients; it is capped, so that simulation alone takes constant memory. A short run
    is one block: stepping through each block twice for its gradient would cost a third more time.
    """
    if num_steps <= 1024:
        return (1, num_steps, 0)
    root = min(round(num_steps**0.5), 256)
    near = [b for b in range(max(root // 2, 1), 2 * root + 1) if num_steps % b == 0]
    size = min(near, key=lambda b: abs(b - root)) if near else root
    return (num_steps // size, size, num_steps % size)


def simulate_run(run: Run, guide: AbstractGuide | None, plan: Plan | None, x0: Array | None, key: Array) -> tuple:
    """States at the requested times, log-weight, divergence. Pure; vectorize over `key`."""
    key_start, key_noise = jr.split(key)
    carry = initial_state(run.sde, run.driver, guide, plan, x0, key_start)
    num_steps = run.steps.h.shape[0]
    first = carry[0]
    if num_steps == 0:
        return jnp.broadcast_to(first, (len(run.slots), *first.shape)), carry[2], carry[3]
    slots = np.asarray(run.slots)
    blocks, size, rest = _block_sizes(num_steps)
    inputs = (run.steps, None if plan is None else plan.steps)
    take = lambda a, b: jax.tree.map(lambda x: x[a:b], inputs)
    end_only = bool((slots == num_steps).all())
    # All states of a single block are at hand: picking the wanted ones is cheaper than scattering them.
    keep_all = not end_only and (blocks == 1 or num_steps <= 4 * slots.size)
    saved = np.full(num_steps, slots.size)  # out of range: not saved
    saved[slots[slots > 0] - 1] = np.flatnonzero(slots > 0)

    def plain(carry: tuple, index: Array, inputs: tuple) -> tuple:
        steps, plans = inputs
        white = _normals(jr.fold_in(key_noise, index), steps.h.shape[0], run)
        if guide is None:
            noise = jax.vmap(lambda s, w: shape_noise(run.driver, s, w))(steps, white)
            body = lambda carry, xs: _free_step(run, carry, *xs)
            return jax.lax.scan(body, carry, (steps, noise))
        body = lambda carry, xs: _guided_step(run, guide, carry, *xs)
        return jax.lax.scan(body, carry, (steps, white, plans))

    # Memory of the backward pass: the states between blocks, and those of one block.
    block = plain if blocks == 1 else jax.checkpoint(plain)

    def outer(state: tuple, xs: tuple) -> tuple:
        carry, out = state
        index, inputs, where = xs
        carry, states = block(carry, index, inputs)
        if keep_all:
            return (carry, out), states
        return (carry, out if end_only else out.at[where].set(states, mode="drop")), None

    out = jnp.zeros((slots.size, *first.shape), first.dtype)
    grouped = jax.tree.map(lambda x: x[: blocks * size].reshape(blocks, size, *x.shape[1:]), inputs)
    where = jnp.asarray(saved)
    xs = (jnp.arange(blocks), grouped, where[: blocks * size].reshape(blocks, size))
    if blocks == 1:
        state, states = outer((carry, out), jax.tree.map(lambda x: x[0], xs))
    else:
        state, states = jax.lax.scan(outer, (carry, out), xs)
        states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
    if rest:
        cut = blocks * size
        state, tail = outer(state, (jnp.asarray(blocks), take(cut, num_steps), where[cut:]))
        states = states if tail is None else jnp.concatenate([states, tail])
    (last, _, weight, kl), out = state
    if end_only:
        out = jnp.broadcast_to(last, out.shape)
    elif keep_all:
        out = states[np.maximum(slots - 1, 0)]
    starts = (slots == 0)[:, None]
    return (jnp.where(starts, first, out) if starts.any() else out), weight, kl


def _free_step(run: Run, carry: tuple, step: Step, noise: Any) -> tuple:
    x, v, weight, kl = carry
    x, v = advance(run.sde, run.driver, step, x, v, noise)
    return (x, v, weight, kl), x


def _guided_step(run: Run, guide: AbstractGuide | Any, carry: tuple, step: Step, white: Array, plan: Any) -> tuple:
    x, v, weight, kl = carry
    eps, ratio, divergence = guide.draw(run.sde, run.driver, plan, step, x, v, white.ravel())
    noise = shape_noise(run.driver, step, eps.reshape(white.shape))
    x, v = advance(run.sde, run.driver, step, x, v, noise)
    return (x, v, weight + ratio, kl + divergence), x


def simulate(
    sde: FractionalSDE,
    ts: Float[ArrayLike, " n"],
    *,
    x0: Float[ArrayLike, " d"] | None = None,
    guide: AbstractGuide | None = None,
    max_step: float | None = None,
    steps_per_interval: int | None = None,
    key: Key[Array, ""],
) -> Paths:
    """Simulate one path of the model, or of its posterior under a guide, from time 0. `jax.vmap` over keys draws many.

    Args:
        sde: the model.
        ts: increasing times in [0, horizon], shape (n,), at which the state is returned.
        x0: initial state instead of the model's own, (d,).
        guide: the distribution to draw from instead of the model's; its observation times become step boundaries too.
            It takes `x0` for normal with the same moments, cut to the support; `log_weight` makes up for that.
        max_step: longest time step; `None` takes one step from each time to the next, so that `ts` is the grid. Needs
            times known on the host.
        steps_per_interval: equal steps in each interval instead, a Python integer; works with traced times.
        key: typed PRNG key.

    Returns:
        The `Paths`. Beyond 1,024 steps a path's forward memory grows at most with the square root of their number and
        not at all beyond 65,536; its backward memory with the square root, from there on with a 256th of them. The
        step times, 4 bytes a step in float32, are shared by all paths of a `vmap`.

    Raises:
        ValueError: if the times are not increasing or outside the horizon, or `max_step` is too long.
        NonFiniteError: if the solution blows up (outside jit; inside, the states are NaN), naming step and state.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), gs.Constant(0.5), gn.ma_fbm(), hurst=0.7, horizon=2.0)
        >>> gs.simulate(model, jnp.linspace(0.0, 2.0, 21), key=jax.random.key(0)).x.shape
        (21, 1)

    Source: steps as in `FractionalSDE`; the exact distribution of the lifted noise was derived for this library.
    """
    check_key(key)
    check_parts(sde, guide, optional=True)
    if guide is not None:
        check(x0 is None, "x0", "None with a guide", x0, "Build the guide from a model with that initial state.")
    if x0 is not None:
        x0 = jnp.asarray(x0, sde.dtype)
        check(x0.shape in ((), (sde.dim,)), "x0", f"of shape ({sde.dim},)", f"shape {x0.shape}")
        x0 = jnp.broadcast_to(x0, (sde.dim,))
        check_finite("x0", x0)
    grid, rows, seen = _grid_with(sde, ts, guide, max_step, steps_per_interval)
    noises, plan = prepare(sde, guide, grid)
    x, weight, kl = _simulate(sde, grid, noises, guide, plan, seen, x0, key)
    paths = Paths(ts, x[rows], weight, kl)
    explain_blow_up(sde, grid, noises, guide, plan, seen, x0=x0, key=key, paths=paths)
    return paths


def check_parts(sde: Any, guide: Any, observed: Any = None, *, optional: bool = False) -> None:
    """Refuse what is not a model, a guide and observations, and a guide that was made for others of another size."""
    hint = "The order is (sde, guide, observed)."
    check(isinstance(sde, FractionalSDE), "sde", "a FractionalSDE", type(sde).__name__, hint)
    if optional and guide is None:
        return
    hint += " A guide is made by `LinearGuide(sde, observed)` or `NeuralGuide(sde, observed, key=key)`."
    check(isinstance(guide, AbstractGuide), "guide", "a guide", type(guide).__name__, hint)
    hint = "Make a guide for this model and these observations."
    for name, wanted, made in _made_for(sde, guide):
        check(made == wanted, "guide", f"made for a model with {name} = {wanted}", f"one made for {made}", hint)
    if optional:
        return
    check(isinstance(observed, Observed), "observed", "an Observed", type(observed).__name__)
    n, times = observed.ts.shape[0], guide.times()
    if times is not None:
        m = times.shape[0]
        check(m == n, "guide", f"made for {n} observation times, as in `observed`", f"one made for {m}", hint)


def _made_for(sde: FractionalSDE, guide: AbstractGuide) -> Iterator[tuple[str, Any, Any]]:
    """What a guide's layout depends on, as this model has it and as the guide's own had it."""
    linear = guide.linear if isinstance(guide, NeuralGuide) else guide
    if isinstance(linear, LinearGuide):
        yield "dim", sde.dim, linear.sde.dim
        for name in ("num_terms", "history_rank"):
            yield f"lift.{name}", getattr(sde.lift, name), getattr(linear.sde.lift, name)
        yield "varying", sde.varying, linear.sde.varying
        if "exact" in (sde.step, linear.sde.step):  # it draws one normal more
            yield "step", sde.step, linear.sde.step
    if isinstance(guide, NeuralGuide):
        d, k, r = sde.dim, sde.lift.num_terms, sde.lift.history_rank
        yield "dim", d, int(guide.control.out_size) // 2
        per_start = int(guide.origin.out_size) // d  # r + 1 means and a triangular root of them: (r + 1) (r + 4) / 2
        yield "lift.history_rank", r, round(((8 * per_start + 9) ** 0.5 - 5) / 2)
        width = guide.encoder.cell.hidden_size
        processes = (int(guide.control.in_size) - d - width - 3) // d
        yield "processes in the state", k + r if sde.varying else k, processes


@eqx.filter_jit
def _simulate(
    sde: FractionalSDE, grid: Grid, noises: Noises, guide: Any, plan: Any, seen: Any, x0: Any, key: Array
) -> tuple[Array, Array, Array]:
    run = make_run(sde, grid, noises)
    if guide is not None and plan is None:
        plan = guide.plan(grid, noises, seen)
    return simulate_run(run, guide, plan, x0, key)


def _grid_with(sde: FractionalSDE, ts: Any, guide: AbstractGuide | None, max_step: Any, steps: int | None) -> tuple:
    """The grid through `ts` and the guide's observation times, where `ts` are on it, and where those are."""
    extra = None if guide is None else guide.times()
    grid = make_grid(sde, ts, max_step, steps)  # also when a union is taken: its errors name `ts`
    rows = np.arange(len(grid.slots))
    if extra is None:
        return grid, rows, ()
    if ts is extra:
        return grid, rows, grid.slots
    check_inside(sde, extra, "observed.ts of the guide")
    hint = "Under jit close over the times, or ask for the observation times themselves."
    check(is_concrete(ts) and is_concrete(extra), "ts", "concrete with a guide", "traced times", hint)
    wanted, observed = np.asarray(ts, np.float64), np.asarray(extra, np.float64)
    order = np.sort(np.concatenate([wanted, observed]))
    # An observation time within rounding of a requested one is that one.
    slack = 4 * np.finfo(sde.dtype).eps * max(order[-1], 1e-300)
    union = order[np.concatenate([[True], np.diff(order) > slack])]
    grid = make_grid(sde, union, max_step, steps)
    nearest = lambda times: np.argmin(np.abs(union[None, :] - times[:, None]), axis=1)
    return grid, nearest(wanted), tuple(grid.slots[i] for i in nearest(observed))


def explain_blow_up(
    sde: FractionalSDE,
    grid: Grid,
    noises: Noises,
    guide: AbstractGuide | None,
    plan: Any,
    seen: tuple[int, ...],
    *,
    x0: Any,
    key: Array,
    paths: Paths,
) -> None:
    """Raise with the first bad step and the state before it, if the outcome is known and not finite."""
    if not all(is_concrete(leaf) for leaf in (paths.x, paths.log_weight)):
        return
    weight_fine = not bool(jnp.isnan(paths.log_weight) | jnp.isposinf(paths.log_weight))  # -inf: an impossible path
    if weight_fine and bool(jnp.isfinite(paths.x).all()):
        return
    if guide is not None:
        plan = guide.plan(grid, noises, seen) if plan is None else plan
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(eqx.filter(plan, eqx.is_inexact_array))):
            raise NonFiniteError(
                "`guide` must be finite; its control on this grid holds NaN or infinity, so no path can be drawn. Try "
                "a smaller `max_step` for it, or check the observations and the drift along the noise-free path."
            )
    every = dataclasses.replace(grid, slots=tuple(range(grid.num_steps + 1)))
    states = np.asarray(_simulate(sde, every, noises, guide, plan, seen, x0, jr.clone(key))[0])
    bad = ~np.isfinite(states).all(axis=1)
    if not bad.any():
        raise NonFiniteError(
            "`log_weight` must be finite; the path is, so the guide's control or the law of x0 is not."
        )
    k = int(np.argmax(bad)) - 1
    if k < 0:
        hint = "Check the law of `x0`" + ("." if guide is None else " and the guide.")
        raise NonFiniteError(f"`x` must be finite; the initial state is {states[0]}. {hint}")
    t, h = float(grid.t[k]), float(grid.h[k])
    raise NonFiniteError(
        f"`x` must be finite; the solution blew up in step {k} (t = {t:.6g}, length {h:.3g}), state before it "
        f"{states[k]}. Try a smaller `max_step`, step='exponential' for a stiff drift, or check the drift there."
    )
