"""Revival of components that have died: they have no weight, hence no gradient, for ever."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Key

from genkit.bridge._bridge import Bridge
from genkit.bridge._coordinates import parameters_of
from genkit.bridge._potential import MixturePotential
from genkit.bridge._report import component_masses
from genkit.bridge._scales import take


# A component is dead below this share of an equal mass.
_DEAD_SHARE = 0.02


class Revival:
    """Give the weakest component half of the heaviest one if it has died, as a `Phase.after`.

    Args:
        x0: some samples of the source, shape (n, d).
        x1: some samples of the target, shape (m, d).
    """

    def __init__(self, x0: Float[Array, " n d"], x1: Float[Array, " m d"]):
        self.x0 = x0
        self.x1 = x1
        self.count = 0

    def __call__(self, bridge: Bridge, key: Key[Array, ""]) -> Bridge:
        """The bridge, with a component replaced where one was dead."""
        potential, dead = revive(bridge.potential, self.x0, self.x1, key)
        if not bool(dead):
            return bridge
        self.count += 1
        return eqx.tree_at(lambda b: b.potential, bridge, potential)


@eqx.filter_jit
def revive(
    potential: MixturePotential, x0: Float[Array, " n d"], x1: Float[Array, " m d"], key: Key[Array, ""]
) -> tuple[MixturePotential, Bool[Array, ""]]:
    """Give a dead component half of the heaviest one, a little apart.

    Args:
        potential: the potential.
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        key: typed PRNG key.

    Returns:
        The potential, and whether a component was dead.
    """
    # The smaller share counts: a component that carries nothing at one end has no gradient.
    masses = component_masses(potential, x0, x1).min(0)
    worst = jnp.argmin(masses)
    heaviest = jnp.argmax(masses)
    dead = masses[worst] < _DEAD_SHARE / potential.num_components

    def copied(leaf: Array) -> Array:
        return leaf.at[worst].set(jnp.where(dead, leaf[heaviest], leaf[worst]))

    params = jax.tree.map(copied, parameters_of(potential))
    # The two halves together weigh what the heaviest did, so that the plan hardly changes.
    half = jnp.where(dead, -jnp.log(2.0), 0.0).astype(potential.log_weights.dtype)
    weights = params.log_weights.at[worst].add(half).at[heaviest].add(half)
    # Apart by a fraction of the component's own width, so that the halves can part.
    noise = jr.normal(key, (1, potential.scale.noise_size(potential.dim)), weights.dtype)
    offset = 0.5 * jnp.sqrt(potential.epsilon) * take(potential.scale, heaviest).color(noise)[0]
    shifts = params.shifts.at[worst].add(jnp.where(dead, offset, 0.0))
    params = eqx.tree_at(lambda p: (p.log_weights, p.shifts), params, (weights, shifts))
    return eqx.combine(params, potential), dead
