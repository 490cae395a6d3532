"""The Euler-Maruyama steps of every bridge that is simulated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from genkit.bridge._abstract import AbstractBridge


def euler_maruyama(
    bridge: AbstractBridge,
    x: Float[Array, " *batch d"],
    start: Real[Array, ""],
    step: Real[Array, ""] | float,
    num_steps: int,
    noise: Callable[[Array], Float[Array, " *batch d"]],
) -> Float[Array, " *batch d"]:
    """States after equal steps of Euler and Maruyama.

    Args:
        bridge: the bridge, of which the drift and epsilon are used.
        x: states at `start`, shape (..., d).
        start: time of the first step.
        step: length of a step.
        num_steps: number of steps.
        noise: standard normal noise of the shape of `x` for the number of a step.

    Returns:
        States at the end, shape (..., d).
    """

    def advance(i: Array, x: Array) -> Array:
        # The drift at the start of a step: at t = 1 it may be singular, and is never asked.
        moved = x + step * bridge.drift(start + i * step, x)
        return moved + jnp.sqrt(bridge.epsilon * step) * noise(i)

    return jax.lax.fori_loop(0, num_steps, advance, x)
