"""L-BFGS on all samples at once, which takes out the noise that minibatches leave."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import NonFiniteError
from genkit.bridge._batches import UnpairedBatches
from genkit.bridge._bridge import Bridge
from genkit.bridge._coordinates import ANCHOR_PERIOD, anchored, find_anchors, parameters_of, plan_width, settle
from genkit.bridge._objectives import light_constant
from genkit.bridge._potential import MixturePotential


class _Descent(NamedTuple):
    params: MixturePotential
    anchors: Array
    state: PyTree
    best: MixturePotential
    best_value: Array


def mean_gap(potential: MixturePotential, x0: Float[Array, " n d"], x1: Float[Array, " m d"]) -> Float[Array, ""]:
    """Mean log phi(x0, 0) - mean log phi(x1, 1): the objective less second moments, which no parameter moves.

    Points go through in blocks and are computed again for the gradient, so that memory does not grow with n K d.
    """

    def mean(x: Float[Array, " n d"], t: float) -> Float[Array, ""]:
        # Checkpointed, so that a gradient holds one block of terms and not all of them.
        value = jax.checkpoint(lambda x: jax.nn.logsumexp(potential.terms(x, t)))
        return jnp.mean(jax.lax.map(value, x, batch_size=4096))

    return mean(x0, 0.0) - mean(x1, 1.0)


@eqx.filter_jit
def descend(
    potential: MixturePotential,
    x0: Float[Array, " n d"],
    x1: Float[Array, " m d"],
    points: Float[Array, " g d"],
    *,
    num_steps: int,
) -> tuple[MixturePotential, Float[Array, " num_steps"]]:
    """L-BFGS on all samples at once, where the objective is deterministic.

    Args:
        potential: where to start.
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        points: some samples of the source, from which the anchors are taken.
        num_steps: steps; each looks at all samples a few times.

    Returns:
        The best potential met, and the objective before each step.
    """
    optimizer = optax.lbfgs(memory_size=20)
    width = plan_width(potential)

    def inner(potential: MixturePotential, anchors: Array) -> MixturePotential:
        """Parameters in anchored coordinates, shifts in widths of the plan."""
        moved = anchored(potential, anchors, 1.0)
        return parameters_of(eqx.tree_at(lambda p: p.shifts, moved, moved.shifts / width))

    def outer(params: MixturePotential, anchors: Array) -> MixturePotential:
        """The potential of such parameters."""
        moved = eqx.combine(params, potential)
        return anchored(eqx.tree_at(lambda p: p.shifts, moved, moved.shifts * width), anchors, -1.0)

    def choose(condition: Array, new: MixturePotential, old: MixturePotential) -> MixturePotential:
        return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)

    def step(carry: _Descent, index: Array) -> tuple[_Descent, Array]:
        params, anchors, state, best, best_value = carry

        def loss(params: MixturePotential) -> Float[Array, ""]:
            return mean_gap(outer(params, anchors), x0, x1)

        value, gradient = optax.value_and_grad_from_state(loss)(params, state=state)
        # Rounding can make a line search fail: the best potential met is kept apart.
        best = choose(value < best_value, parameters_of(outer(params, anchors)), best)
        best_value = jnp.minimum(value, best_value)
        # The line search looks at the objective itself, which is deterministic on all samples.
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        params = optax.apply_updates(params, updates)

        def move(params: MixturePotential) -> tuple[MixturePotential, Array, PyTree]:
            now = settle(outer(params, anchors))
            again = find_anchors(now, points)
            params = inner(now, again)
            # Curvature measured in other coordinates says nothing here: the memory starts anew.
            return params, again, optimizer.init(params)

        due = index % ANCHOR_PERIOD == ANCHOR_PERIOD - 1
        params, anchors, state = jax.lax.cond(due, move, lambda params: (params, anchors, state), params)
        return _Descent(params, anchors, state, best, best_value), value

    anchors = find_anchors(potential, points)
    params = inner(potential, anchors)
    infinity = jnp.asarray(jnp.inf, x0.dtype)
    init = _Descent(params, anchors, optimizer.init(params), parameters_of(potential), infinity)
    end, values = jax.lax.scan(step, init, jnp.arange(num_steps))
    # The scan judges each state before its step: the last one is judged here.
    last = outer(end.params, end.anchors)
    best = choose(mean_gap(last, x0, x1) < end.best_value, parameters_of(last), end.best)
    return settle(eqx.combine(best, potential)), values + light_constant(potential, x0, x1)


class Polish:
    """Descend on all samples at the end of a training, as its `Phase.after`.

    Args:
        data: the samples.
        points: some samples of the source, from which the anchors are taken.
        num_steps: steps of L-BFGS.
    """

    def __init__(self, data: UnpairedBatches, points: Float[Array, " n d"], num_steps: int):
        self.data = data
        self.points = points
        self.num_steps = num_steps
        self.trace: Array | None = None

    def __call__(self, bridge: Bridge, key: Key[Array, ""]) -> Bridge:
        """The bridge after the descent, whose objective before each step is kept in `trace`."""
        x0, x1 = self.data.fixed(key)
        potential, self.trace = descend(bridge.potential, x0, x1, self.points, num_steps=self.num_steps)
        if not bool(jnp.isfinite(self.trace).all()):
            raise NonFiniteError("`objective` must be finite; got NaN or infinity while polishing. Try `polish=0`.")
        return eqx.tree_at(lambda b: b.potential, bridge, potential)
