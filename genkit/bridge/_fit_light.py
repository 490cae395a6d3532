"""Fitting a light bridge to samples: balanced start, Adam or L-BFGS, and a guard against collapse."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Key, Real

from genkit._core._checks import (
    NonFiniteError,
    check,
    check_choice,
    check_count,
    check_finite,
    check_key,
    check_positive,
    check_shape,
)
from genkit._core._fields import trainable

from ._bridge import Bridge
from ._closed_form import check_epsilon
from ._matrix_scale import noise_size
from ._objectives import LightObjective, UnpairedBatches, light_loss, light_optimizer
from ._potential import MixturePotential
from ._start import MAX_POINTS, balanced_start, published_start


KINDS = ("diag", "full", "lowrank", "iso")
# Log eigenvalues are held in this range: beyond it a component is a point, or uniform, to float32.
LOG_RANGE = (-14.0, 8.0)


class FitReport(eqx.Module):
    """What a fit did.

    Args:
        objective: the (minibatch) objective before each step, shape (num_steps,).
        masses: share of each component among transported source points and among target points, shape (2, K).
        effective_components: 1 / sum(mass^2), the smaller of the two shares.
        end_marginal_error: energy distance 2E|X-Y| - E|X-X'| - E|Y-Y'| between transported source and target.
        revived: how many times a dead component was given half of the heaviest.
    """

    objective: Float[Array, " num_steps"]
    masses: Float[Array, " 2 k"]
    effective_components: Float[Array, ""]
    end_marginal_error: Float[Array, ""]
    revived: Any


def _tidy(potential: MixturePotential) -> MixturePotential:
    """Fix the gauge of the weights and keep scales in range."""
    potential = eqx.tree_at(lambda p: p.log_weights, potential, replace_fn=lambda w: w - jnp.max(w))
    if not hasattr(potential.scale, "log_values"):
        return potential
    return eqx.tree_at(lambda p: p.scale.log_values, potential, replace_fn=lambda s: jnp.clip(s, *LOG_RANGE))


def component_masses(
    potential: MixturePotential, x0: Float[Array, " n d"], x1: Float[Array, " m d"]
) -> Float[Array, " 2 k"]:
    """The share of each component among transported source points and among target points.

    Args:
        potential: the potential.
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).

    Returns:
        Shape (2, K), rows summing to one.
    """
    mean = lambda x, t: jax.vmap(lambda x: jax.nn.softmax(potential.terms(x, t)))(x).mean(0)
    return jnp.stack([mean(x0, 0.0), mean(x1, 1.0)])


def _revive(potential, opt_state, x0, x1, key):
    """Give each dead component half of the heaviest one, a little apart, and forget its momentum."""
    k = potential.num_components
    masses = component_masses(potential, x0, x1).min(0)
    worst, heaviest = jnp.argmin(masses), jnp.argmax(masses)
    dead = masses[worst] < 0.02 / k
    params, rest = eqx.partition(potential, trainable(potential))
    copied = jax.tree.map(lambda leaf: leaf.at[worst].set(jnp.where(dead, leaf[heaviest], leaf[worst])), params)
    half = jnp.where(dead, -jnp.log(2.0), 0.0).astype(potential.log_weights.dtype)
    weights = copied.log_weights.at[worst].add(half).at[heaviest].add(half)
    # Apart by a fraction of the component's own width, so that the halves can part.
    std = jnp.sqrt(potential.epsilon) * jax.tree.map(lambda leaf: leaf[heaviest][None], potential.scale).color(
        jr.normal(key, (1, noise_size(potential.scale, potential.dim)), weights.dtype)
    )
    shifts = copied.shifts.at[worst].add(jnp.where(dead, 0.5 * std[0], 0.0))
    copied = eqx.tree_at(lambda p: (p.log_weights, p.shifts), copied, (weights, shifts))
    forget = lambda leaf: leaf.at[worst].multiply(1.0 - dead.astype(leaf.dtype)) if leaf.ndim else leaf
    return eqx.combine(copied, rest), jax.tree.map(forget, opt_state), dead


def _anchors(potential: MixturePotential, x0: Float[Array, " n d"]) -> Float[Array, " k d"]:
    """Where each component works: its mean among the source points, from the center."""
    logits = jax.vmap(lambda x: jax.nn.log_softmax(potential.terms(x, 0.0)))(x0)
    return jax.nn.softmax(logits, 0).T @ (x0 - potential.center)


def _anchored(potential: MixturePotential, anchors: Float[Array, " k d"], sign: float) -> MixturePotential:
    """Coordinates of a fit: log-weights and end points as they are at the anchors (sign 1), or back (sign -1).

    Far from where a component works, a small change of its scale or shift is a large change of its weight there. At
    the anchors they hardly interact, which suits Adam, because it scales each number by itself.
    """
    moved = potential.scale.apply(anchors)
    shifts = potential.shifts + sign * moved
    raw = potential.shifts if sign > 0 else shifts
    tilt = jnp.sum(anchors * (moved + 2.0 * raw), -1) / (2.0 * potential.epsilon)
    return eqx.tree_at(lambda p: (p.log_weights, p.shifts), potential, (potential.log_weights + sign * tilt, shifts))


def anchored_units(potential: MixturePotential, rate: Float[Array, ""]) -> tuple[Array, Array, Array]:
    """Arguments of `light_optimizer` in anchored coordinates: ends in widths of the plan, log-weights in nats."""
    trace = jnp.trace(potential.scale.dense(potential.dim), axis1=-2, axis2=-1)
    width = jnp.sqrt(potential.epsilon * jnp.mean(trace) / potential.dim)
    return rate, width, jnp.asarray(jnp.inf, width.dtype)


@eqx.filter_jit
def run_adam(potential, data, objective, optimizer_args, guard_points, key, *, num_steps, guard, published):
    """The whole fit as one scan: (potential, objective of each step, number of revivals)."""
    rate, spread, epsilon = optimizer_args
    schedule = rate if published else lambda step: rate * 0.5 * (1.0 + jnp.cos(jnp.pi * step / num_steps))
    optimizer = light_optimizer(schedule, spread, epsilon)
    mask = trainable(potential)
    period = max(1, num_steps // 40)
    guard0, guard1 = guard_points
    inner = lambda potential, anchors: potential if published else _anchored(potential, anchors, 1.0)
    outer = lambda potential, anchors: potential if published else _anchored(potential, anchors, -1.0)
    anchors = _anchors(potential, guard0)
    params, rest = eqx.partition(inner(potential, anchors), mask)

    def step(carry, index):
        params, anchors, opt_state, revived = carry
        key_batch, key_guard, key_objective = jr.split(jr.fold_in(key, index), 3)
        batch = data(key_batch)
        loss = lambda params: objective(Bridge(outer(eqx.combine(params, rest), anchors)), batch, key=key_objective)[0]
        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = eqx.partition(_tidy(eqx.combine(optax.apply_updates(params, updates), rest)), mask)[0]
        if guard:

            def look(args):
                params, anchors, opt_state, revived = args
                now = outer(eqx.combine(params, rest), anchors)
                new, opt_state, dead = _revive(now, opt_state, guard0, guard1, key_guard)
                anchors = _anchors(new, guard0)
                return eqx.partition(inner(new, anchors), mask)[0], anchors, opt_state, revived + dead

            # Not near the end: what is revived must have time to settle.
            due = (index % period == period - 1) & (index < 0.7 * num_steps)
            carry = (params, anchors, opt_state, revived)
            params, anchors, opt_state, revived = jax.lax.cond(due, look, lambda args: args, carry)
        return (params, anchors, opt_state, revived), value

    init = (params, anchors, optimizer.init(params), jnp.zeros((), jnp.int32))
    (params, anchors, _, revived), values = jax.lax.scan(step, init, jnp.arange(num_steps))
    return _tidy(outer(eqx.combine(params, rest), anchors)), values, revived


@eqx.filter_jit
def _run_lbfgs(potential, x0, x1, *, num_steps):
    """Full-batch L-BFGS: the objective is deterministic on fixed samples."""
    params, rest = eqx.partition(potential, trainable(potential))
    optimizer = optax.lbfgs(memory_size=20)
    loss = lambda params: light_loss(eqx.combine(params, rest), x0, x1)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps)
    return _tidy(eqx.combine(params, rest)), values, jnp.zeros((), jnp.int32)


@eqx.filter_jit
def judge(potential, x0, x1, key):
    """Component masses, and the energy distance of the transported source to the target."""
    masses = component_masses(potential, x0, x1)
    keys = jr.split(key, x0.shape[0])
    ends = jax.vmap(lambda x, key: potential.sample_endpoint(x, 0.0, key=key))(x0, keys)[:1500]
    target = x1[:1500]

    def mean_distance(a, b):
        square = jnp.sum(a * a, -1)[:, None] - 2.0 * a @ b.T + jnp.sum(b * b, -1)
        return jnp.mean(jnp.sqrt(jnp.maximum(square, 0.0)))

    ends, target = ends - potential.center, target - potential.center
    energy = 2.0 * mean_distance(ends, target) - mean_distance(ends, ends) - mean_distance(target, target)
    return masses, 1.0 / jnp.max(jnp.sum(masses**2, -1)), energy


def check_samples(x0: Any, x1: Any, num_components: int, kind: str) -> tuple[Array, Array]:
    """Both sample sets as arrays; refuse different spaces, too few points and degenerate laws."""
    arrays = []
    for name, x in (("x0", x0), ("x1", x1)):
        x = jnp.asarray(x)
        check_shape(name, x, (None, None), "One sample per row.")
        check(jnp.issubdtype(x.dtype, jnp.floating), name, "floating-point samples", x)
        check_finite(name, x)
        arrays.append(x)
    x0, x1 = arrays
    check_shape("x1", x1, (None, x0.shape[1]), "Both ends live in one space.")
    count = min(x0.shape[0], x1.shape[0])
    hint = f"Take fewer components than {num_components}, or more samples."
    check(
        count >= max(2 * num_components, 2),
        "x0 and x1",
        f"at least {2 * num_components} samples each",
        f"{count}",
        hint,
    )
    for name, x in (("x0", x0), ("x1", x1)):
        std = np.asarray(x, np.float64).std(0)
        hint = "Leave out constant coordinates, or add noise."
        low = f"a standard deviation of {std.min():.3g} in coordinate {int(std.argmin())}"
        check(bool(std.min() > 1e-6 * std.max()), name, "of nonzero variance in every coordinate", low, hint)
        if kind in ("full", "lowrank"):
            values = np.linalg.eigvalsh(np.atleast_2d(np.cov(np.asarray(x, np.float64).T)))
            low = f"a smallest relative eigenvalue of {values[0] / values[-1]:.3g}"
            hint = "Project on principal components, add noise, or use scale='diag'."
            check(bool(values[0] > 1e-9 * values[-1]), name, "of full-rank covariance", low, hint)
    return x0, x1


def start_bridge(
    x0: Array,
    x1: Array,
    epsilon: Array,
    num_components: int,
    *,
    scale: str,
    init: str,
    rank: int,
    key: Key[Array, ""],
    start_scale: float = 0.1,
) -> MixturePotential:
    """The potential a fit starts from.

    Args:
        x0: samples of the source.
        x1: samples of the target.
        epsilon: variance of the reference at t = 1.
        num_components: K.
        scale: covariance family.
        init: `balanced` or `published`.
        rank: columns of the low-rank family.
        key: typed PRNG key.
        start_scale: initial scale of the published start.

    Returns:
        The potential.
    """
    if init == "published":
        return published_start(
            x1, epsilon, num_components=num_components, kind=scale, rank=rank, start_scale=start_scale, key=key
        )
    return balanced_start(x0, x1, epsilon, num_components=num_components, kind=scale, rank=rank, key=key)


def fit_light(
    x0: Float[ArrayLike, " n d"],
    x1: Float[ArrayLike, " m _"],
    epsilon: Real[ArrayLike, ""],
    num_components: int,
    *,
    scale: str = "diag",
    num_steps: int = 3000,
    init: str = "balanced",
    optimizer: str = "adam",
    learning_rate: float | None = None,
    batch_size: int | None = None,
    rank: int = 8,
    start_scale: float = 0.1,
    guard: bool | None = None,
    key: Key[Array, ""],
) -> tuple[Bridge, FitReport]:
    r"""Fit a light Schrödinger bridge to unpaired samples of its two ends.

    Minimizes $E_{p_0}\log c(X_0) - E_{p_1}\log v(X_1)$, the Kullback-Leibler divergence from the true plan up to a
    constant. The balanced start puts components on k-means clusters of the target, solves a Riccati equation for each
    scale and a convex problem for the weights, so that no component begins dead; the guard gives a component that
    dies on the way half of the heaviest one.

    Args:
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        epsilon: variance of the reference at t = 1.
        num_components: K.
        scale: covariance family: `iso`, `diag`, `full` or `lowrank`.
        num_steps: optimizer steps.
        init: `balanced`, or `published` for the recipe of the source below: random targets as shifts, one scale,
            plain Adam with a constant rate, no guard.
        optimizer: `adam` on minibatches, or `lbfgs` on all samples at once.
        learning_rate: step of the log-scales; end points move in widths of the plan, log-weights in nats. Default
            2e-2 with cosine decay; 1e-3 (constant) for the published recipe.
        batch_size: samples of each end per step; default 1024, or 128 for the published recipe.
        rank: columns of the low-rank family.
        start_scale: initial scale of the published recipe.
        guard: revive dead components; by default with `init="balanced"` and Adam.
        key: typed PRNG key.

    Returns:
        The bridge, and a `FitReport`.

    Raises:
        ValueError: if epsilon is not positive, the ends differ in dimension, samples are too few for K or degenerate.
        NonFiniteError: if the fit diverges.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> key0, key1, key_fit = jax.random.split(jax.random.key(0), 3)
        >>> x0, x1 = jax.random.normal(key0, (500, 2)), 2.0 + 0.5 * jax.random.normal(key1, (500, 2))
        >>> bridge, report = gk.bridge.fit_light(x0, x1, 0.5, 2, num_steps=50, key=key_fit)
        >>> report.objective.shape
        (50,)

    Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024, algorithm 1.
    """
    check_key(key)
    check_epsilon(epsilon)
    check_count("num_components", num_components)
    check_count("num_steps", num_steps)
    check_count("rank", rank)
    check_choice("scale", scale, KINDS)
    check_choice("init", init, ("balanced", "published"))
    check_choice("optimizer", optimizer, ("adam", "lbfgs"))
    if learning_rate is not None:
        check_positive("learning_rate", learning_rate)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_positive("start_scale", start_scale)
    x0, x1 = check_samples(x0, x1, num_components, scale)
    published = init == "published"
    key_order0, key_order1, key_start, key_steps, key_judge = jr.split(key, 5)
    epsilon = jnp.asarray(epsilon, x1.dtype)
    few0 = jr.permutation(key_order0, x0)[:MAX_POINTS]
    few1 = jr.permutation(key_order1, x1)[:MAX_POINTS]
    potential = start_bridge(
        few0, few1, epsilon, num_components, scale=scale, init=init, rank=rank, key=key_start, start_scale=start_scale
    )
    check_finite("start", potential, "The balanced start failed; try init='published' or more samples.")
    if optimizer == "lbfgs":
        potential, values, revived = _run_lbfgs(potential, x0, x1, num_steps=num_steps)
    else:
        batch_size = batch_size or (128 if published else 1024)
        rate = jnp.asarray(learning_rate or (1e-3 if published else 2e-2), x1.dtype)
        units = (rate, jnp.ones((), x1.dtype), epsilon) if published else anchored_units(potential, rate)
        data = UnpairedBatches(x0, x1, batch_size)
        potential, values, revived = run_adam(
            potential,
            data,
            LightObjective(),
            units,
            (few0, few1),
            key_steps,
            num_steps=num_steps,
            guard=not published if guard is None else guard,
            published=published,
        )
    check_finished(values, potential)
    return Bridge(potential), FitReport(values, *judge(potential, few0, few1, key_judge), revived)


def check_finished(values, potential) -> None:
    """Refuse a diverged fit, naming the step."""
    bad = np.flatnonzero(~np.isfinite(np.asarray(values)))
    if bad.size:
        raise NonFiniteError(
            f"`objective` must be finite; got NaN or infinity from step {bad[0]} on. Try a smaller `learning_rate`."
        )
    check_finite("fitted potential", potential, "Try a smaller `learning_rate`.")
