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

from ._anchored import anchored_adam, find_anchors, run_lbfgs, tidy
from ._bridge import Bridge
from ._closed_form import check_epsilon
from ._matrix_scale import noise_size
from ._objectives import LightObjective, UnpairedBatches, light_constant, light_optimizer
from ._potential import MixturePotential
from ._start import MAX_POINTS, balanced_start, published_start


KINDS = ("diag", "full", "lowrank", "iso")


class FitReport(eqx.Module):
    """What a fit did.

    Args:
        objective: the objective before each step (of a minibatch with Adam), shape (num_steps + polish,).
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


@eqx.filter_jit
def run_adam(potential, data, objective, rate, guard_points, key, *, num_steps, guard, published):
    """The whole fit as one scan: (potential, objective of each step, number of revivals)."""
    guard0, guard1 = guard_points
    if published:  # one rate for all; the published solver holds epsilon times the log-weights
        optimizer = light_optimizer(rate, 1.0, 1.0 / potential.epsilon)
    else:
        schedule = lambda step: rate * 0.5 * (1.0 + jnp.cos(jnp.pi * step / num_steps))
        optimizer = anchored_adam(schedule, guard0, potential.epsilon, potential.center)
    mask = trainable(potential)
    period = max(1, num_steps // 40)
    params, rest = eqx.partition(potential, mask)

    def look(carry, key):
        params, opt_state, revived = carry
        new, opt_state, dead = _revive(eqx.combine(params, rest), opt_state, guard0, guard1, key)
        if not published:
            opt_state = opt_state._replace(anchors=find_anchors(new, guard0))
        return eqx.partition(new, mask)[0], opt_state, revived + dead

    def step(carry, index):
        params, opt_state, revived = carry
        key_batch, key_guard, key_objective = jr.split(jr.fold_in(key, index), 3)
        batch = data(key_batch)
        loss = lambda params: objective(Bridge(eqx.combine(params, rest)), batch, key=key_objective)[0]
        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = eqx.partition(tidy(eqx.combine(optax.apply_updates(params, updates), rest)), mask)[0]
        carry = (params, opt_state, revived)
        if guard:
            # Not near the end: what is revived must have time to settle.
            due = (index % period == period - 1) & (index < 0.7 * num_steps)
            carry = jax.lax.cond(due, look, lambda carry, key: carry, carry, key_guard)
        return carry, value

    init = (params, optimizer.init(params), jnp.zeros((), jnp.int32))
    (params, _, revived), values = jax.lax.scan(step, init, jnp.arange(num_steps))
    return tidy(eqx.combine(params, rest)), values, revived


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


@eqx.filter_jit
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
    polish: int = 0,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    rank: int = 8,
    start_scale: float = 0.1,
    guard: bool | None = None,
    noise: float | None = None,
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
        polish: steps of L-BFGS on all samples after Adam: they take out the noise of minibatches.
        learning_rate: step of the log-scales; end points move in widths of the plan, log-weights in nats. Default
            2e-2 with cosine decay; 1e-3 (constant) for the published recipe.
        batch_size: samples of each end per step; default 1024, or 128 for the published recipe.
        rank: columns of the low-rank family.
        start_scale: initial scale of the published recipe.
        guard: revive dead components; by default with `init="balanced"` and Adam.
        noise: standard deviation of normal noise added to the samples whenever they are looked at, in the units of the
            data. It smooths both ends, which keeps fits to few samples from following each of them; choose it, like
            `num_components`, on samples left out. Default none.
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
    check_choice("scale", scale, KINDS)
    check_choice("init", init, ("balanced", "published"))
    check_choice("optimizer", optimizer, ("adam", "lbfgs"))
    _check_numbers(num_components=num_components, num_steps=num_steps, rank=rank, batch_size=batch_size)
    check_count("polish", polish, minimum=0)
    _check_numbers(learning_rate=learning_rate, start_scale=start_scale, noise=noise)
    x0, x1 = check_samples(x0, x1, num_components, scale)
    published = init == "published"
    batch_size = batch_size or (128 if published else 1024)
    key_order0, key_order1, key_start, key_steps, key_judge, key_noise = jr.split(key, 6)
    epsilon = jnp.asarray(epsilon, x1.dtype)
    data = UnpairedBatches(x0, x1, batch_size, None if noise is None else jnp.asarray(noise, x1.dtype))
    few0 = jr.permutation(key_order0, x0)[:MAX_POINTS]
    few1 = jr.permutation(key_order1, x1)[:MAX_POINTS]
    potential = start_bridge(
        few0, few1, epsilon, num_components, scale=scale, init=init, rank=rank, key=key_start, start_scale=start_scale
    )
    check_finite("start", potential, "The balanced start failed; try init='published' or more samples.")
    values, revived = [], jnp.zeros((), jnp.int32)
    if optimizer == "adam":
        rate = jnp.asarray(learning_rate or (1e-3 if published else 2e-2), x1.dtype)
        guard = not published if guard is None else guard
        options = {"num_steps": num_steps, "guard": guard, "published": published}
        few = (few0, few1)
        potential, trace, revived = run_adam(potential, data, LightObjective(), rate, few, key_steps, **options)
        values.append(trace)
    full_steps = num_steps if optimizer == "lbfgs" else polish
    if full_steps:
        every0, every1 = data.fixed(key_noise)
        potential, trace = run_lbfgs(potential, every0, every1, few0, num_steps=full_steps)
        values.append(trace + light_constant(potential, every0, every1))
    trace = jnp.concatenate(values)
    check_finished(trace, potential)
    return Bridge(potential), FitReport(trace, *judge(potential, few0, few1, key_judge), revived)


def _check_numbers(**numbers) -> None:
    """Refuse counts below one and numbers that are not positive; `None` stands for a default."""
    for name, value in numbers.items():
        if value is not None and name in ("num_components", "num_steps", "rank", "batch_size"):
            check_count(name, value)
        elif value is not None:
            check_positive(name, value)


def check_finished(values, potential) -> None:
    """Refuse a diverged fit, naming the step."""
    bad = np.flatnonzero(~np.isfinite(np.asarray(values)))
    if bad.size:
        raise NonFiniteError(
            f"`objective` must be finite; got NaN or infinity from step {bad[0]} on. Try a smaller `learning_rate`."
        )
    check_finite("fitted potential", potential, "Try a smaller `learning_rate`.")
