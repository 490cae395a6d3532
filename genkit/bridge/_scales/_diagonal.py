"""Multiples of the identity, and diagonal matrices."""

import equinox as eqx
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from genkit._core._fields import as_number
from genkit.bridge._scales._base import AbstractLogScale, Time


class Iso(AbstractLogScale):
    """Multiples of the identity, S_k = exp(log_values_k) I.

    Args:
        log_values: logarithms of the multiples, shape (K,).

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> print(gk.bridge.Iso(jnp.zeros(1)).resolvent(0.5, jnp.ones((1, 2))))
        [[1. 1.]]
    """

    log_values: Float[Array, " k"] = eqx.field(converter=as_number)

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return jnp.exp(self.log_values)[:, None] * v

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return self.resolvent_values(t)[:, None] * v

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        # S - I by expm1, which keeps its digits where S is near the identity.
        return self.resolvent_values(t)[:, None] * (r + jnp.expm1(self.log_values)[:, None] * z)

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        return dim * jnp.log(self.resolvent_values(t))

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        p = self.resolvent_values(t)
        return p * (jnp.expm1(self.log_values) * (x @ x) + 2.0 * (r @ x) - t * jnp.sum(r * r, -1))

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        return jnp.exp(0.5 * self.log_values)[:, None] * noise

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        return jnp.exp(self.log_values)[:, None, None] * jnp.eye(dim, dtype=self.log_values.dtype)

    def distribution(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        std = jnp.sqrt(epsilon) * jnp.exp(0.5 * self.log_values)[:, None]
        return dist.Normal(mean, jnp.broadcast_to(std, mean.shape)).to_event(1)


class Diag(AbstractLogScale):
    """Diagonal matrices, S_k = diag(exp(log_values_k)).

    Args:
        log_values: logarithms of the diagonals, shape (K, d).

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> print(gk.bridge.Diag(jnp.zeros((1, 2))).apply(jnp.array([[1.0, 2.0]])))
        [[1. 2.]]
    """

    log_values: Float[Array, " k d"] = eqx.field(converter=as_number)

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return jnp.exp(self.log_values) * v

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return self.resolvent_values(t) * v

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return self.resolvent_values(t) * (r + jnp.expm1(self.log_values) * z)

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        del dim
        return jnp.sum(jnp.log(self.resolvent_values(t)), -1)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        p = self.resolvent_values(t)
        pr = p * r
        return (jnp.expm1(self.log_values) * p) @ (x * x) + 2.0 * (pr @ x) - t * jnp.sum(pr * r, -1)

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        return jnp.exp(0.5 * self.log_values) * noise

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        return jnp.exp(self.log_values)[..., None] * jnp.eye(dim, dtype=self.log_values.dtype)

    def distribution(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        std = jnp.sqrt(epsilon) * jnp.exp(0.5 * self.log_values)
        return dist.Normal(mean, jnp.broadcast_to(std, mean.shape)).to_event(1)
