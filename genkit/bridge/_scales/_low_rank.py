"""Diagonal plus low-rank matrices."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from genkit._core._fields import as_number
from genkit.bridge._scales._base import AbstractLogScale, Time


class LowRank(AbstractLogScale):
    """Diagonal plus low rank, S_k = diag(exp(log_values_k)) + F_k F_k'; resolvents by Woodbury in q dimensions.

    Args:
        log_values: logarithms of the diagonal part, shape (K, d).
        factors: the factors F_k, shape (K, d, q).

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> print(gk.bridge.LowRank(jnp.zeros((1, 2)), jnp.ones((1, 2, 1))).dense(2)[0])
        [[2. 1.]
         [1. 2.]]
    """

    matrices: ClassVar[bool] = True

    log_values: Float[Array, " k d"] = eqx.field(converter=as_number)
    factors: Float[Array, " k d q"] = eqx.field(converter=as_number)

    def noise_size(self, dim: int) -> int:
        return dim + self.factors.shape[-1]

    def _woodbury(self, t: Time) -> tuple[Float[Array, " k d"], Float[Array, " k q q"], Float[Array, " k d q"]]:
        """E^-1 with E = (1-t) I + t D, the Cholesky factor of I + t F' E^-1 F, and E^-1 F."""
        t = jnp.asarray(t, self.log_values.dtype)
        inverse = 1.0 / ((1.0 - t) + t * jnp.exp(self.log_values))
        scaled = inverse[..., None] * self.factors
        count = self.factors.shape[-1]
        inner = jnp.eye(count, dtype=self.factors.dtype) + t * (self.factors.mT @ scaled)
        return inverse, jnp.linalg.cholesky(inner), scaled

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        inner = jnp.einsum("kdq,kd->kq", self.factors, v)
        return jnp.exp(self.log_values) * v + jnp.einsum("kdq,kq->kd", self.factors, inner)

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        inverse, root, scaled = self._woodbury(t)
        inner = jax.scipy.linalg.cho_solve((root, True), jnp.einsum("kdq,kd->kq", scaled, v)[..., None])[..., 0]
        return inverse * v - t * jnp.einsum("kdq,kq->kd", scaled, inner)

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        # (S - I) P = (I - P) / t has no 1/t when written as (D - I) E^-1 + (E^-1 F) M^-1 (E^-1 F)'.
        inverse, root, scaled = self._woodbury(t)
        inner = jnp.einsum("kdq,kd->kq", scaled, z - t * r)
        inner = jax.scipy.linalg.cho_solve((root, True), inner[..., None])[..., 0]
        return inverse * (r + jnp.expm1(self.log_values) * z) + jnp.einsum("kdq,kq->kd", scaled, inner)

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        del dim
        inverse, root, _ = self._woodbury(t)
        return jnp.sum(jnp.log(inverse), -1) - 2.0 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), -1)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        # q independent solves of the whitened factor replace one solve per point: matrix products over a batch.
        inverse, root, scaled = self._woodbury(t)
        white = jax.scipy.linalg.solve_triangular(root, scaled.mT, lower=True)  # (k, q, d)
        pr = inverse * r - t * jnp.einsum("kqd,kq->kd", white, jnp.einsum("kqd,kd->kq", white, r))
        diagonal = (jnp.expm1(self.log_values) * inverse) @ (x * x)  # (S - I) P as in `pull`
        correction = jnp.sum(jnp.einsum("kqd,d->kq", white, x) ** 2, -1)
        return diagonal + correction + 2.0 * (pr @ x) - t * jnp.sum(pr * r, -1)

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        dim = self.log_values.shape[1]
        diagonal = jnp.exp(0.5 * self.log_values) * noise[:, :dim]
        return diagonal + jnp.einsum("kdq,kq->kd", self.factors, noise[:, dim:])

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        eye = jnp.eye(dim, dtype=self.log_values.dtype)
        return jnp.exp(self.log_values)[..., None] * eye + self.factors @ self.factors.mT

    def distribution(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        factor = jnp.broadcast_to(jnp.sqrt(epsilon) * self.factors, (*mean.shape, self.factors.shape[-1]))
        return dist.LowRankMultivariateNormal(
            mean, factor, jnp.broadcast_to(epsilon * jnp.exp(self.log_values), mean.shape)
        )
