"""Full matrices in their eigenbasis."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from genkit._core._checks import fail, is_concrete
from genkit._core._fields import as_number
from genkit.bridge._scales._base import AbstractLogScale, Time


class Full(AbstractLogScale):
    r"""Full matrices in their eigenbasis, S_k = U_k diag(exp(log_values_k)) U_k'.

    U_k is a product of Householder reflections, $U = H_1 \cdots H_h = I - V T V'$ with unit columns $V$ and
    $T^{-1} = \tfrac12 I + \mathrm{striu}(V'V)$, so it is orthogonal to rounding whatever the reflectors are, and
    gradient steps keep it so. The resolvent is diagonal in the same basis for every t: no factorization per time.

    Args:
        log_values: logarithms of the eigenvalues, shape (K, d).
        reflectors: vectors of the reflections, none of them zero, shape (K, h, d); h = d reaches every S_k.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> scale = gk.bridge.Full(jnp.zeros((1, 2)), jnp.array([[[1.0, 0.0], [1.0, 2.0]]]))
        >>> bool(jnp.allclose(scale.dense(2)[0], jnp.eye(2), atol=1e-6))  # unit eigenvalues: the identity in any basis
        True

    Source: Joffrain, Low, Quintana-Orti, van de Geijn, "Accumulating Householder transformations, revisited", 2006.
    """

    matrices: ClassVar[bool] = True

    log_values: Float[Array, " k d"] = eqx.field(converter=as_number)
    reflectors: Float[Array, " k h d"] = eqx.field(converter=as_number)

    @property
    def basis(self) -> Float[Array, " k d d"]:
        """The orthogonal matrices U_k, eigenvectors in columns."""
        v = self.reflectors / jnp.linalg.norm(self.reflectors, axis=-1, keepdims=True)
        count, dim = v.shape[1:]
        inverse = jnp.triu(v @ v.mT, 1) + 0.5 * jnp.eye(count, dtype=v.dtype)
        return jnp.eye(dim, dtype=v.dtype) - v.mT @ jax.scipy.linalg.solve_triangular(inverse, v, lower=False)

    def _conjugate(self, values: Float[Array, " k d"], v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        basis = self.basis
        return jnp.einsum("kde,ke->kd", basis, values * jnp.einsum("kde,kd->ke", basis, v))

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return self._conjugate(jnp.exp(self.log_values), v)

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        return self._conjugate(self.resolvent_values(t), v)

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        # In the eigenbasis everything is diagonal: two products with the basis, whatever the time.
        basis = self.basis
        zb = jnp.einsum("kde,d->ke", basis, z)
        rb = jnp.einsum("kde,kd->ke", basis, r)
        return jnp.einsum("kde,ke->kd", basis, self.resolvent_values(t) * (rb + jnp.expm1(self.log_values) * zb))

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        del dim
        return jnp.sum(jnp.log(self.resolvent_values(t)), -1)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        basis = self.basis
        p = self.resolvent_values(t)
        xb = jnp.einsum("kde,d->ke", basis, x)
        rb = jnp.einsum("kde,kd->ke", basis, r)
        return jnp.sum(p * (jnp.expm1(self.log_values) * xb * xb + (2.0 * xb - t * rb) * rb), -1)

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        return jnp.einsum("kde,ke->kd", self.basis, jnp.exp(0.5 * self.log_values) * noise)

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        del dim
        basis = self.basis
        return (basis * jnp.exp(self.log_values)[:, None, :]) @ basis.mT

    def distribution(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        # R of a QR factorization of sqrt(S) U' is a triangular root of S; its signs are those numpyro expects.
        root = (self.basis * jnp.exp(0.5 * self.log_values)[:, None, :]).mT
        upper = jnp.linalg.qr(root, mode="r")
        sign = jnp.where(jnp.diagonal(upper, axis1=-2, axis2=-1) < 0, -1.0, 1.0).astype(upper.dtype)
        return dist.MultivariateNormal(mean, scale_tril=jnp.sqrt(epsilon) * (upper * sign[..., None]).mT)


def full_from_dense(matrices: Float[Array, " k d d"]) -> Full:
    """The `Full` family of given symmetric positive definite matrices.

    Args:
        matrices: shape (K, d, d).

    Returns:
        The family; its eigenvectors agree with those of `matrices` up to signs, which do not matter.

    Raises:
        ValueError: if a concrete matrix is not positive definite.

    """
    values, vectors = jnp.linalg.eigh(matrices)
    if is_concrete(values):
        smallest = float(np.min(np.asarray(values)))
        if not smallest > 0:
            fail("scales", "symmetric positive definite", f"smallest eigenvalue {smallest:.3g}")
    # LAPACK's raw QR of an orthogonal matrix holds its Householder vectors below the diagonal.
    packed, _ = jnp.linalg.qr(vectors, mode="raw")
    packed = packed.mT
    dim = matrices.shape[-1]
    return Full(jnp.log(values), (jnp.tril(packed, -1) + jnp.eye(dim, dtype=packed.dtype)).mT)
