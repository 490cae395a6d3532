"""Coordinates in which a light bridge is fitted; Adam, and L-BFGS on all samples, in them."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from genkit._core._fields import trainable

from ._objectives import light_optimizer
from ._potential import MixturePotential


# Log eigenvalues are held in this range: beyond it a component is a point, or uniform, to float32.
LOG_RANGE = (-14.0, 8.0)
# Steps between two choices of the anchors.
ANCHOR_PERIOD = 100


def tidy(potential: MixturePotential) -> MixturePotential:
    """Fix the gauge of the weights and keep scales in range."""
    potential = eqx.tree_at(lambda p: p.log_weights, potential, replace_fn=lambda w: w - jnp.max(w))
    if not hasattr(potential.scale, "log_values"):
        return potential
    return eqx.tree_at(lambda p: p.scale.log_values, potential, replace_fn=lambda s: jnp.clip(s, *LOG_RANGE))


def find_anchors(potential: MixturePotential, x0: Float[Array, " n d"]) -> Float[Array, " k d"]:
    """Where each component works: its mean among the source points, from the center."""
    logits = jax.vmap(lambda x: jax.nn.log_softmax(potential.terms(x, 0.0)))(x0)
    return jax.nn.softmax(logits, 0).T @ (x0 - potential.center)


def anchored(potential: MixturePotential, anchors: Float[Array, " k d"], sign: float) -> MixturePotential:
    """Coordinates of a fit: log-weights and end points as they are at the anchors (sign 1), or back (sign -1).

    Far from where a component works, a small change of its scale or shift is a large change of its weight there. At
    the anchors they hardly interact, which suits Adam, because it scales each number by itself.
    """
    moved = potential.scale.apply(anchors)
    shifts = potential.shifts + sign * moved
    raw = potential.shifts if sign > 0 else shifts
    tilt = jnp.sum(anchors * (moved + 2.0 * raw), -1) / (2.0 * potential.epsilon)
    return eqx.tree_at(lambda p: (p.log_weights, p.shifts), potential, (potential.log_weights + sign * tilt, shifts))


def plan_width(potential: MixturePotential) -> Float[Array, ""]:
    """Standard deviation of a coordinate of the end point within a component, on average."""
    trace = jnp.trace(potential.scale.dense(potential.dim), axis1=-2, axis2=-1)
    return jnp.sqrt(potential.epsilon * jnp.mean(trace) / potential.dim)


class AnchoredState(NamedTuple):
    """State of `anchored_adam`: where the coordinates have their origin, and Adam's own state."""

    anchors: Array
    width: Array
    step: Array
    adam: Any


def anchored_adam(
    learning_rate: optax.ScalarOrSchedule,
    x0: Float[Array, " n d"],
    epsilon: Float[Array, ""],
    center: Float[Array, " d"],
) -> optax.GradientTransformation:
    """Adam in anchored coordinates, for the trained part of a `MixturePotential`.

    End points move in widths of the plan, log-weights in nats, whatever the units of the data.

    Args:
        learning_rate: step in logarithms of scales.
        x0: some samples of the source, from which the anchors are taken.
        epsilon: the epsilon of the potential.
        center: the center of the potential.

    Returns:
        An optimizer whose `update` needs the parameters.
    """
    frozen = lambda p: (p.epsilon, p.center)
    whole = lambda params: eqx.tree_at(frozen, params, (epsilon, center), is_leaf=lambda leaf: leaf is None)
    split = lambda potential: eqx.partition(potential, trainable(potential))

    def init(params):
        potential = whole(params)
        width = plan_width(potential)
        return AnchoredState(
            find_anchors(potential, x0),
            width,
            jnp.zeros((), jnp.int32),
            light_optimizer(learning_rate, width, 1.0).init(params),
        )

    def update(updates, state, params=None):
        adam = light_optimizer(learning_rate, state.width, 1.0)
        free, held = split(anchored(whole(params), state.anchors, 1.0))
        back = lambda free: split(anchored(eqx.combine(free, held), state.anchors, -1.0))[0]
        (gradient,) = jax.vjp(back, free)[1](updates)
        steps, inner = adam.update(gradient, state.adam, free)
        new = tidy(whole(back(optax.apply_updates(free, steps))))
        due = state.step % ANCHOR_PERIOD == ANCHOR_PERIOD - 1
        anchors = jax.lax.cond(due, lambda: find_anchors(new, x0), lambda: state.anchors)
        moved = jax.tree.map(jnp.subtract, split(new)[0], params)
        return moved, AnchoredState(anchors, state.width, state.step + 1, inner)

    return optax.GradientTransformation(init, update)


def mean_gap(potential: MixturePotential, x0: Float[Array, " n d"], x1: Float[Array, " m d"]) -> Float[Array, ""]:
    """Mean log phi(x0, 0) - mean log phi(x1, 1): the objective less second moments, which no parameter moves.

    Points go through in blocks and are computed again for the gradient, so that memory does not grow with n K d.
    """

    def mean(x, t):
        value = jax.checkpoint(lambda x: jax.nn.logsumexp(potential.terms(x, t)))
        return jnp.mean(jax.lax.map(value, x, batch_size=4096))

    return mean(x0, 0.0) - mean(x1, 1.0)


@eqx.filter_jit
def run_lbfgs(
    potential: MixturePotential,
    x0: Float[Array, " n d"],
    x1: Float[Array, " m d"],
    guard0: Float[Array, " g d"],
    *,
    num_steps: int,
) -> tuple[MixturePotential, Float[Array, " num_steps"]]:
    """L-BFGS on all samples at once, where the objective is deterministic.

    Args:
        potential: where to start.
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        guard0: some samples of the source, from which the anchors are taken.
        num_steps: steps; each looks at all samples a few times.

    Returns:
        The best potential met, and the objective before each step less its constant.
    """
    optimizer = optax.lbfgs(memory_size=20)
    mask = trainable(potential)
    width = plan_width(potential)
    stretch = lambda p, factor: eqx.tree_at(lambda p: p.shifts, p, p.shifts * factor)
    _, rest = eqx.partition(potential, mask)
    inner = lambda p, anchors: eqx.partition(stretch(anchored(p, anchors, 1.0), 1.0 / width), mask)[0]
    outer = lambda params, anchors: anchored(stretch(eqx.combine(params, rest), width), anchors, -1.0)

    def step(carry, index):
        params, anchors, state, best, best_value = carry
        loss = lambda params: mean_gap(outer(params, anchors), x0, x1)
        value, gradient = optax.value_and_grad_from_state(loss)(params, state=state)
        better = value < best_value  # rounding can make a line search fail
        keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(better, new, old), new, old)
        best = keep(eqx.partition(outer(params, anchors), mask)[0], best)
        best_value = jnp.minimum(value, best_value)
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        params = optax.apply_updates(params, updates)

        def move(params):
            now = tidy(outer(params, anchors))
            again = find_anchors(now, guard0)
            params = inner(now, again)
            return params, again, optimizer.init(params)

        due = index % ANCHOR_PERIOD == ANCHOR_PERIOD - 1
        params, anchors, state = jax.lax.cond(due, move, lambda params: (params, anchors, state), params)
        return (params, anchors, state, best, best_value), value

    anchors = find_anchors(potential, guard0)
    params = inner(potential, anchors)
    start = eqx.partition(potential, mask)[0]
    init = (params, anchors, optimizer.init(params), start, jnp.asarray(jnp.inf, x0.dtype))
    (params, anchors, _, best, best_value), values = jax.lax.scan(step, init, jnp.arange(num_steps))
    last = outer(params, anchors)
    better = mean_gap(last, x0, x1) < best_value
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), eqx.partition(last, mask)[0], best)
    return tidy(eqx.combine(best, rest)), values
