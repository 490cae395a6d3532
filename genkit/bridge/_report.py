"""Diagnostics of fitted bridges, and the result of a fit."""

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from genkit.bridge._potential import MixturePotential
from genkit.divergence import energy_distance
from genkit.training import Fitted


# Points of each end between which the report measures a distance.
_JUDGED = 1500


class FittedBridge(Fitted):
    """The result of fitting a bridge: a `gk.Fitted` that also unpacks as `(bridge, report)`."""

    def __iter__(self) -> Iterator[PyTree]:
        """The bridge and the report."""
        return iter((self.model, self.report))


class FitReport(eqx.Module):
    """Diagnostics of a fit.

    Args:
        objective: the objective before each step (of a minibatch with Adam), shape (num_steps + polish,).
        masses: share of each component among transported source points and among target points, shape (2, K).
        effective_components: 1 / sum(mass^2), the smaller of the two shares.
        end_marginal_error: energy distance 2E|X-Y| - E|X-X'| - E|Y-Y'| between transported source and target.
        revived: number of times a dead component was given half of the heaviest.
    """

    objective: Float[Array, " num_steps"]
    masses: Float[Array, " 2 k"]
    effective_components: Float[Array, ""]
    end_marginal_error: Float[Array, ""]
    revived: Int[Array, ""]


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

    def mean(x: Float[Array, " n d"], t: float) -> Float[Array, " k"]:
        return jax.vmap(lambda x: jax.nn.softmax(potential.terms(x, t)))(x).mean(0)

    return jnp.stack([mean(x0, 0.0), mean(x1, 1.0)])


@eqx.filter_jit
def summarize(
    potential: MixturePotential, x0: Float[Array, " n d"], x1: Float[Array, " m d"], key: Key[Array, ""]
) -> tuple[Float[Array, " 2 k"], Float[Array, ""], Float[Array, ""]]:
    """Component masses, effective components, and the energy distance of the transported source to the target."""
    masses = component_masses(potential, x0, x1)
    # The distance is a sum over pairs: a sample of the points says as much as the report shows.
    starts = x0[:_JUDGED]
    keys = jax.random.split(key, starts.shape[0])
    ends = jax.vmap(lambda x, key: potential.sample_endpoint(x, 0.0, key=key))(starts, keys)
    return masses, 1.0 / jnp.max(jnp.sum(masses**2, -1)), energy_distance(ends, x1[:_JUDGED])
