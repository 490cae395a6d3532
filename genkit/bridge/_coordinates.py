"""Coordinates in which a light bridge is fitted, and the gauge of its parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genkit._core._fields import trainable
from genkit.bridge._potential import MixturePotential


# Log eigenvalues are held in this range: beyond it a component is a point, or uniform, to float32.
LOG_RANGE = (-14.0, 8.0)
# Steps between two choices of the anchors.
ANCHOR_PERIOD = 100


def settle(potential: MixturePotential) -> MixturePotential:
    """The potential with the largest log-weight zero and scales in range; its plan changes only where they were not."""
    # A common shift of the log-weights is no part of the plan.
    log_weights = potential.log_weights - jnp.max(potential.log_weights)
    scale = potential.scale.clipped(*LOG_RANGE)
    return eqx.tree_at(lambda p: (p.log_weights, p.scale), potential, (log_weights, scale))


def find_anchors(potential: MixturePotential, x0: Float[Array, " n d"]) -> Float[Array, " k d"]:
    """The mean of the source points that each component takes care of, from the center."""
    # Normalized over components first, then over points: each component by the points it takes care of.
    logits = jax.vmap(lambda x: jax.nn.log_softmax(potential.terms(x, 0.0)))(x0)
    return jax.nn.softmax(logits, 0).T @ (x0 - potential.center)


def anchored(potential: MixturePotential, anchors: Float[Array, " k d"], sign: float) -> MixturePotential:
    """Coordinates of a fit: log-weights and end points as they are at the anchors (sign 1), or back (sign -1).

    Far from where a component works, a small change of its scale or shift is a large change of its weight there. At
    the anchors they hardly interact, which suits Adam, because it scales each number by itself.
    """
    moved = potential.scale.apply(anchors)
    shifts = potential.shifts + sign * moved
    # The tilt is that of the shifts before they are moved, whichever way this goes.
    if sign > 0:
        raw = potential.shifts
    else:
        raw = shifts
    tilt = jnp.sum(anchors * (moved + 2.0 * raw), -1) / (2.0 * potential.epsilon)
    return eqx.tree_at(lambda p: (p.log_weights, p.shifts), potential, (potential.log_weights + sign * tilt, shifts))


def parameters_of(potential: MixturePotential) -> MixturePotential:
    """The trained part of a potential; None elsewhere."""
    return eqx.filter(potential, trainable(potential))


def plan_width(potential: MixturePotential) -> Float[Array, ""]:
    """Standard deviation of a coordinate of the end point within a component, on average."""
    trace = jnp.trace(potential.scale.dense(potential.dim), axis1=-2, axis2=-1)
    return jnp.sqrt(potential.epsilon * jnp.mean(trace) / potential.dim)
