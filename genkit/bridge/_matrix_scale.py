"""Covariance families that hold matrices: a rotated diagonal, and a diagonal plus low rank."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from ._scale import AbstractScale, Time


class Eigen(AbstractScale):
    r"""Full matrices in their eigenbasis, S_k = U_k diag(exp(log_values_k)) U_k'.

    U_k is a product of Householder reflections, $U = H_1 \cdots H_h = I - V T V'$ with unit columns $V$ and
    $T^{-1} = \tfrac12 I + \mathrm{striu}(V'V)$, so it is orthogonal to rounding whatever the reflectors are, and
    gradient steps keep it so. The resolvent is diagonal in the same basis for every t: no factorization per time.

    Args:
        log_values: logarithms of the eigenvalues, shape (K, d).
        reflectors: vectors of the reflections, none of them zero, shape (K, h, d); h = d reaches every S_k.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> scale = gk.bridge.Eigen(jnp.zeros((1, 2)), jnp.array([[[1.0, 0.0], [1.0, 2.0]]]))
        >>> bool(jnp.allclose(scale.dense(2)[0], jnp.eye(2), atol=1e-6))  # unit eigenvalues: the identity in any basis
        True

    Source: Joffrain, Low, Quintana-Orti, van de Geijn, "Accumulating Householder transformations, revisited", 2006.
    """

    matrices: ClassVar[bool] = True

    log_values: Float[Array, " k d"] = eqx.field(converter=jnp.asarray)
    reflectors: Float[Array, " k h d"] = eqx.field(converter=jnp.asarray)

    @property
    def num_components(self) -> int:
        """The number K of matrices."""
        return self.log_values.shape[0]

    @property
    def basis(self) -> Float[Array, " k d d"]:
        """The orthogonal matrices U_k, eigenvectors in columns."""
        v = self.reflectors / jnp.linalg.norm(self.reflectors, axis=-1, keepdims=True)
        count, dim = v.shape[1:]
        inverse = jnp.triu(v @ v.mT, 1) + 0.5 * jnp.eye(count, dtype=v.dtype)
        return jnp.eye(dim, dtype=v.dtype) - v.mT @ jax.scipy.linalg.solve_triangular(inverse, v, lower=False)

    def _p(self, t: Time) -> Float[Array, " k d"]:
        t = jnp.asarray(t, self.log_values.dtype)
        return 1.0 / ((1.0 - t) + t * jnp.exp(self.log_values))

    def _conjugate(self, values: Float[Array, " k d"], v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        basis = self.basis
        return jnp.einsum("kde,ke->kd", basis, values * jnp.einsum("kde,kd->ke", basis, v))

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """S_k v_k for every component."""
        return self._conjugate(jnp.exp(self.log_values), v)

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k(t) v_k."""
        return self._conjugate(self._p(t), v)

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k [r_k + (S_k - I) z]."""
        basis = self.basis
        zb = jnp.einsum("kde,d->ke", basis, z)
        rb = jnp.einsum("kde,kd->ke", basis, r)
        return jnp.einsum("kde,ke->kd", basis, self._p(t) * (rb + jnp.expm1(self.log_values) * zb))

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t)."""
        del dim
        return jnp.sum(jnp.log(self._p(t)), -1)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """Twice epsilon times the exponent of the potential."""
        basis, p = self.basis, self._p(t)
        xb = jnp.einsum("kde,d->ke", basis, x)
        rb = jnp.einsum("kde,kd->ke", basis, r)
        return jnp.sum(p * (jnp.expm1(self.log_values) * xb * xb + (2.0 * xb - t * rb) * rb), -1)

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        """One draw of N(0, S_k) for every component."""
        return jnp.einsum("kde,ke->kd", self.basis, jnp.exp(0.5 * self.log_values) * noise)

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        """The matrices themselves."""
        del dim
        basis = self.basis
        return (basis * jnp.exp(self.log_values)[:, None, :]) @ basis.mT

    def law(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        """The numpyro law N(mean_k, epsilon S_k)."""
        # R of a QR factorization of sqrt(S) U' is a triangular root of S; its signs are those numpyro expects.
        root = (self.basis * jnp.exp(0.5 * self.log_values)[:, None, :]).mT
        upper = jnp.linalg.qr(root, mode="r")
        sign = jnp.where(jnp.diagonal(upper, axis1=-2, axis2=-1) < 0, -1.0, 1.0).astype(upper.dtype)
        return dist.MultivariateNormal(mean, scale_tril=jnp.sqrt(epsilon) * (upper * sign[..., None]).mT)


class LowRank(AbstractScale):
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

    log_values: Float[Array, " k d"] = eqx.field(converter=jnp.asarray)
    factors: Float[Array, " k d q"] = eqx.field(converter=jnp.asarray)

    @property
    def num_components(self) -> int:
        """The number K of matrices."""
        return self.log_values.shape[0]

    def _woodbury(self, t: Time) -> tuple[Float[Array, " k d"], Float[Array, " k q q"], Float[Array, " k d q"]]:
        """E^-1 with E = (1-t) I + t D, the Cholesky factor of I + t F' E^-1 F, and E^-1 F."""
        t = jnp.asarray(t, self.log_values.dtype)
        inverse = 1.0 / ((1.0 - t) + t * jnp.exp(self.log_values))
        scaled = inverse[..., None] * self.factors
        count = self.factors.shape[-1]
        inner = jnp.eye(count, dtype=self.factors.dtype) + t * (self.factors.mT @ scaled)
        return inverse, jnp.linalg.cholesky(inner), scaled

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """S_k v_k for every component."""
        inner = jnp.einsum("kdq,kd->kq", self.factors, v)
        return jnp.exp(self.log_values) * v + jnp.einsum("kdq,kq->kd", self.factors, inner)

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k(t) v_k."""
        inverse, root, scaled = self._woodbury(t)
        inner = jax.scipy.linalg.cho_solve((root, True), jnp.einsum("kdq,kd->kq", scaled, v)[..., None])[..., 0]
        return inverse * v - t * jnp.einsum("kdq,kq->kd", scaled, inner)

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k [r_k + (S_k - I) z]."""
        # (S - I) P = (I - P) / t has no 1/t when written as (D - I) E^-1 + (E^-1 F) M^-1 (E^-1 F)'.
        inverse, root, scaled = self._woodbury(t)
        inner = jnp.einsum("kdq,kd->kq", scaled, z - t * r)
        inner = jax.scipy.linalg.cho_solve((root, True), inner[..., None])[..., 0]
        return inverse * (r + jnp.expm1(self.log_values) * z) + jnp.einsum("kdq,kq->kd", scaled, inner)

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t)."""
        del dim
        inverse, root, _ = self._woodbury(t)
        return jnp.sum(jnp.log(inverse), -1) - 2.0 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), -1)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """Twice epsilon times the exponent of the potential."""
        # q independent solves of the whitened factor replace one solve per point: matrix products over a batch.
        inverse, root, scaled = self._woodbury(t)
        white = jax.scipy.linalg.solve_triangular(root, scaled.mT, lower=True)  # (k, q, d)
        pr = inverse * r - t * jnp.einsum("kqd,kq->kd", white, jnp.einsum("kqd,kd->kq", white, r))
        diagonal = (jnp.expm1(self.log_values) * inverse) @ (x * x)  # (S - I) P as in `pull`
        correction = jnp.sum(jnp.einsum("kqd,d->kq", white, x) ** 2, -1)
        return diagonal + correction + 2.0 * (pr @ x) - t * jnp.sum(pr * r, -1)

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        """One draw of N(0, S_k) for every component."""
        dim = self.log_values.shape[1]
        diagonal = jnp.exp(0.5 * self.log_values) * noise[:, :dim]
        return diagonal + jnp.einsum("kdq,kq->kd", self.factors, noise[:, dim:])

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        """The matrices themselves."""
        eye = jnp.eye(dim, dtype=self.log_values.dtype)
        return jnp.exp(self.log_values)[..., None] * eye + self.factors @ self.factors.mT

    def law(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        """The numpyro law N(mean_k, epsilon S_k)."""
        factor = jnp.broadcast_to(jnp.sqrt(epsilon) * self.factors, (*mean.shape, self.factors.shape[-1]))
        return dist.LowRankMultivariateNormal(
            mean, factor, jnp.broadcast_to(epsilon * jnp.exp(self.log_values), mean.shape)
        )


def noise_size(scale: AbstractScale, dim: int) -> int:
    """How many standard normal numbers `scale.color` needs per component."""
    return dim + (scale.factors.shape[-1] if isinstance(scale, LowRank) else 0)
