"""Optimizers of light and neural bridges.

They are modules whose numbers are array leaves, so that another learning rate or epsilon compiles nothing.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from genkit.bridge._bridge import Bridge
from genkit.bridge._coordinates import ANCHOR_PERIOD, anchored, find_anchors, parameters_of, plan_width, settle
from genkit.bridge._potential import MixturePotential


class CosineRate(eqx.Module):
    """A learning rate that falls to zero along half a cosine; constant without a number of steps.

    Args:
        peak: the first rate.
        num_steps: steps until zero, or `None`.
    """

    peak: Float[Array, ""]
    num_steps: Float[Array, ""] | None

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        if self.num_steps is None:
            return self.peak
        return self.peak * 0.5 * (1.0 + jnp.cos(jnp.pi * step / self.num_steps))


def _adam_in_units(
    rate: CosineRate, shift_unit: Float[Array, ""], weight_unit: Float[Array, ""]
) -> optax.GradientTransformation:
    """Adam on a potential with a unit of its own for each kind of parameter."""

    # After Adam, whose steps have the size of the rate whatever the units of the gradient.
    def scaled(updates: MixturePotential, params: PyTree) -> MixturePotential:
        del params
        units = (shift_unit, weight_unit)
        leaves = (updates.shifts, updates.log_weights)
        moved = [(leaf * unit).astype(leaf.dtype) for leaf, unit in zip(leaves, units, strict=True)]
        return eqx.tree_at(lambda p: (p.shifts, p.log_weights), updates, moved)

    return optax.chain(optax.scale_by_adam(), optax.stateless(scaled), optax.scale_by_learning_rate(rate))


class AnchoredState(NamedTuple):
    """State of `AnchoredAdam`: the origin of the coordinates, the unit of end points, and Adam's own state."""

    anchors: Array
    width: Array
    step: Array
    adam: PyTree


class LightAdam(eqx.Module):
    """Adam for the potential of a bridge, in the published coordinates or in anchored ones.

    In anchored coordinates end points move in widths of the plan and log-weights in nats, whatever the units of the
    data.

    Args:
        rate: step in logarithms of scales.
        points: samples of the source from which anchors are taken, shape (n, d); `None` for the published coordinates,
            in which epsilon times the log-weights is trained.
        epsilon: the epsilon of the potential.
        center: the center of the potential, shape (d,).
    """

    rate: CosineRate
    points: Float[Array, " n d"] | None
    epsilon: Float[Array, ""]
    center: Float[Array, " d"]

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer in the form of optax."""
        return optax.GradientTransformation(self.init, self.update)

    def init(self, params: Bridge) -> AnchoredState:
        """The state before the first step.

        Args:
            params: the trained part of a bridge.

        Returns:
            The state.
        """
        potential = self._whole(params.potential)
        width = jnp.ones_like(self.epsilon)
        anchors = jnp.zeros_like(potential.shifts)
        if self.points is not None:
            width = plan_width(potential)
            anchors = find_anchors(potential, self.points)
        return AnchoredState(anchors, width, jnp.zeros((), jnp.int32), self._adam(width).init(params.potential))

    def update(
        self, updates: Bridge, state: AnchoredState, params: Bridge | None = None
    ) -> tuple[Bridge, AnchoredState]:
        """One step.

        Args:
            updates: the gradient.
            state: the state.
            params: the trained part of the bridge.

        Returns:
            The step, and the state after it.
        """
        assert params is not None
        gradient = updates.potential
        adam = self._adam(state.width)
        if self.points is None:
            steps, inner = adam.update(gradient, state.adam, params.potential)
            new = settle(self._whole(optax.apply_updates(params.potential, steps)))
            anchors = state.anchors
        else:
            points = self.points
            moved = anchored(self._whole(params.potential), state.anchors, 1.0)
            free = parameters_of(moved)

            def back(free: MixturePotential) -> MixturePotential:
                return parameters_of(anchored(eqx.combine(free, moved), state.anchors, -1.0))

            # The gradient came in the parameters of the potential: the chain rule takes it to the anchored ones.
            (gradient,) = jax.vjp(back, free)[1](gradient)
            steps, inner = adam.update(gradient, state.adam, free)
            new = settle(self._whole(back(optax.apply_updates(free, steps))))
            # Moved seldom: a change of coordinates makes the moments of Adam stale.
            due = state.step % ANCHOR_PERIOD == ANCHOR_PERIOD - 1
            anchors = jax.lax.cond(due, lambda: find_anchors(new, points), lambda: state.anchors)
        # Optax adds what it gets, so the step is told as a difference.
        step = jax.tree.map(jnp.subtract, parameters_of(new), params.potential)
        changed = eqx.tree_at(lambda bridge: bridge.potential, updates, step)
        return changed, AnchoredState(anchors, state.width, state.step + 1, inner)

    def forget(self, state: AnchoredState, before: Bridge, after: Bridge) -> AnchoredState:
        """The state after components of the model were replaced: without their momentum, and with anchors anew.

        Args:
            state: the state.
            before: the bridge as the state knows it.
            after: the bridge with other components.

        Returns:
            The state to go on from.
        """
        return _forget(self, state, before, after)

    def _adam(self, width: Float[Array, ""]) -> optax.GradientTransformation:
        if self.points is None:
            return _adam_in_units(self.rate, jnp.ones_like(self.epsilon), 1.0 / self.epsilon)
        return _adam_in_units(self.rate, width, jnp.ones_like(width))

    def _whole(self, params: MixturePotential) -> MixturePotential:
        """The potential with these parameters; optimizers see None in place of what is not trained."""
        return eqx.tree_at(
            lambda p: (p.epsilon, p.center), params, (self.epsilon, self.center), is_leaf=lambda leaf: leaf is None
        )


@eqx.filter_jit
def _forget(optimizer: LightAdam, state: AnchoredState, before: Bridge, after: Bridge) -> AnchoredState:
    # Told by their shifts: a revived component is put a little apart from its parent.
    replaced = jnp.any(before.potential.shifts != after.potential.shifts, -1)

    def cleared(leaf: Array) -> Array:
        # Counts of steps stay.
        if leaf.ndim == 0:
            return leaf
        keep = 1.0 - replaced.astype(leaf.dtype)
        return leaf * keep.reshape(-1, *[1] * (leaf.ndim - 1))

    state = state._replace(adam=jax.tree.map(cleared, state.adam))
    if optimizer.points is None:
        return state
    return state._replace(anchors=find_anchors(after.potential, optimizer.points))


class CosineAdamW(eqx.Module):
    """AdamW with a learning rate that falls to zero along half a cosine.

    Args:
        rate: the rate.
    """

    rate: CosineRate

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer in the form of optax."""
        return optax.GradientTransformation(self.init, self.update)

    def init(self, params: PyTree) -> PyTree:
        """The state before the first step.

        Args:
            params: what is trained.

        Returns:
            The state.
        """
        return self._adam().init(params)

    def update(self, updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        """One step.

        Args:
            updates: the gradient.
            state: the state.
            params: what is trained.

        Returns:
            The step, and the state after it.
        """
        return self._adam().update(updates, state, params)

    def _adam(self) -> optax.GradientTransformation:
        # So little decay that it only keeps idle weights of networks from drifting.
        return optax.adamw(self.rate, weight_decay=1e-5)
