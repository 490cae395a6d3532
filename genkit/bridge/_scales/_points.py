"""The family of zero matrices, whose bridges end in points."""

import equinox as eqx
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from genkit._core._fields import FROZEN, as_number
from genkit.bridge._scales._base import AbstractScale, Time


class Points(AbstractScale):
    """S_k = 0: the bridge ends in the points r_k themselves, as that of a discrete plan does.

    Args:
        count: an array of shape (K,) whose values are not read; it carries K through `take` and `vmap`.
    """

    count: Float[Array, " k"] = eqx.field(metadata=FROZEN, converter=as_number)

    @property
    def num_components(self) -> int:
        return self.count.shape[0]

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return jnp.zeros_like(v)

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        # This family alone is singular at t = 1.
        return v / (1.0 - t)

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return (r - z) / (1.0 - t)

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        return jnp.broadcast_to(-dim * jnp.log(1.0 - jnp.asarray(t, self.count.dtype)), self.count.shape)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        # As a difference of points, which keeps its digits.
        return jnp.sum(r * r, -1) - jnp.sum((x - r) ** 2, -1) / (1.0 - t)

    def clipped(self, low: float, high: float) -> "Points":
        return self

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        return jnp.zeros_like(noise)

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        return jnp.zeros((self.num_components, dim, dim), self.count.dtype)

    def distribution(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        del epsilon
        return dist.Delta(mean, event_dim=1)
