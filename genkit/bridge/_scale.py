"""Covariance families of a mixture potential: K positive matrices S_k behind one small interface.

Everything a bridge needs from its covariances is S_k itself and the resolvent P_k(t) = ((1-t) I + t S_k)^-1, so a
family is chosen by how cheaply it applies these two. No family forms an inverse or divides by 1-t (except `Zero`,
whose bridge really does end in points).
"""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Int, Real

from genkit._core._fields import FROZEN


Time = Real[ArrayLike, ""]


class AbstractScale(eqx.Module):
    """K symmetric positive (semi-)definite matrices S_k of size d, as a mixture potential needs them.

    All methods work on one point; the leading axis of every array leaf is the component axis. `matrices` says that a
    component holds matrices, so that picking one component per sample would copy them.
    """

    matrices: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def num_components(self) -> int:
        """The number K of matrices."""

    @abc.abstractmethod
    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """S_k v_k for every component."""

    @abc.abstractmethod
    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k(t) v_k with P_k(t) = ((1-t) I + t S_k)^-1."""

    @abc.abstractmethod
    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t), at most `dim` log 1/(1-t)."""

    @abc.abstractmethod
    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """x'(S_k - I) P_k x + 2 x' P_k r_k - t r_k' P_k r_k: twice epsilon times the exponent of the potential."""

    @abc.abstractmethod
    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        """Turn standard normal noise of size `noise_size(d)` into one draw of N(0, S_k) for every component."""

    @abc.abstractmethod
    def dense(self, dim: int) -> Float[Array, " k d d"]:
        """The matrices themselves."""

    @abc.abstractmethod
    def law(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        """The numpyro law N(mean_k, epsilon S_k), batch shape `(*b, k)`, event shape (d,)."""


def noise_size(scale: AbstractScale, dim: int) -> int:
    """How many standard normal numbers `scale.color` needs per component."""
    return dim + (scale.factors.shape[-1] if isinstance(scale, LowRank) else 0)


def take(scale: AbstractScale, index: Int[ArrayLike, ""]) -> AbstractScale:
    """The family of the single component `index` (component axis kept, of size one)."""
    return jax.tree.map(lambda leaf: leaf[jnp.asarray(index)][None], scale)


class Iso(AbstractScale):
    """Multiples of the identity, S_k = exp(log_values_k) I.

    Args:
        log_values: logarithms of the multiples, shape (K,).

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> print(gk.bridge.Iso(jnp.zeros(1)).resolvent(0.5, jnp.ones((1, 2))))
        [[1. 1.]]
    """

    log_values: Float[Array, " k"] = eqx.field(converter=jnp.asarray)

    @property
    def num_components(self) -> int:
        """The number K of matrices."""
        return self.log_values.shape[0]

    def _p(self, t: Time) -> Float[Array, " k"]:
        t = jnp.asarray(t, self.log_values.dtype)
        return 1.0 / ((1.0 - t) + t * jnp.exp(self.log_values))

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """S_k v_k for every component."""
        return jnp.exp(self.log_values)[:, None] * v

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k(t) v_k."""
        return self._p(t)[:, None] * v

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t)."""
        return dim * jnp.log(self._p(t))

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """Twice epsilon times the exponent of the potential."""
        p, s = self._p(t), jnp.exp(self.log_values)
        return p * ((s - 1.0) * (x @ x) + 2.0 * (r @ x) - t * jnp.sum(r * r, -1))

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        """One draw of N(0, S_k) for every component."""
        return jnp.exp(0.5 * self.log_values)[:, None] * noise

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        """The matrices themselves."""
        return jnp.exp(self.log_values)[:, None, None] * jnp.eye(dim, dtype=self.log_values.dtype)

    def law(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        """The numpyro law N(mean_k, epsilon S_k)."""
        std = jnp.sqrt(epsilon) * jnp.exp(0.5 * self.log_values)[:, None]
        return dist.Normal(mean, jnp.broadcast_to(std, mean.shape)).to_event(1)


class Diag(AbstractScale):
    """Diagonal matrices, S_k = diag(exp(log_values_k)).

    Args:
        log_values: logarithms of the diagonals, shape (K, d).

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> print(gk.bridge.Diag(jnp.zeros((1, 2))).apply(jnp.array([[1.0, 2.0]])))
        [[1. 2.]]
    """

    log_values: Float[Array, " k d"] = eqx.field(converter=jnp.asarray)

    @property
    def num_components(self) -> int:
        """The number K of matrices."""
        return self.log_values.shape[0]

    def _p(self, t: Time) -> Float[Array, " k d"]:
        t = jnp.asarray(t, self.log_values.dtype)
        return 1.0 / ((1.0 - t) + t * jnp.exp(self.log_values))

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """S_k v_k for every component."""
        return jnp.exp(self.log_values) * v

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k(t) v_k."""
        return self._p(t) * v

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t)."""
        del dim
        return jnp.sum(jnp.log(self._p(t)), -1)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """Twice epsilon times the exponent of the potential; matrix products when `t` is shared by a batch."""
        p = self._p(t)
        pr = p * r
        return ((jnp.exp(self.log_values) - 1.0) * p) @ (x * x) + 2.0 * (pr @ x) - t * jnp.sum(pr * r, -1)

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        """One draw of N(0, S_k) for every component."""
        return jnp.exp(0.5 * self.log_values) * noise

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        """The matrices themselves."""
        return jnp.exp(self.log_values)[..., None] * jnp.eye(dim, dtype=self.log_values.dtype)

    def law(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        """The numpyro law N(mean_k, epsilon S_k)."""
        std = jnp.sqrt(epsilon) * jnp.exp(0.5 * self.log_values)
        return dist.Normal(mean, jnp.broadcast_to(std, mean.shape)).to_event(1)


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

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t)."""
        del dim
        return jnp.sum(jnp.log(self._p(t)), -1)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """Twice epsilon times the exponent of the potential."""
        basis, p = self.basis, self._p(t)
        xb = jnp.einsum("kde,d->ke", basis, x)
        rb = jnp.einsum("kde,kd->ke", basis, r)
        return jnp.sum(p * ((jnp.exp(self.log_values) - 1.0) * xb * xb + (2.0 * xb - t * rb) * rb), -1)

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
        # (S - I) P = (I - P) / t has no 1/t when written as (D - I) E^-1 + (E^-1 F) M^-1 (E^-1 F)'.
        diagonal = ((jnp.exp(self.log_values) - 1.0) * inverse) @ (x * x)
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


class Zero(AbstractScale):
    """S_k = 0: the bridge ends in the points r_k themselves, as that of a discrete plan does.

    Args:
        count: an array of shape (K,) whose values are not read; it carries K through `take` and `vmap`.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> points, zero = jnp.array([[-1.0], [1.0]]), gk.bridge.Zero(jnp.zeros(2))
        >>> potential = gk.bridge.MixturePotential(jnp.zeros(2), points, zero, 0.1, jnp.zeros(1))
        >>> print(potential.drift(jnp.zeros(1), 0.5))  # halfway between two points of equal weight
        [0.]
    """

    count: Float[Array, " k"] = eqx.field(metadata=FROZEN, converter=jnp.asarray)

    @property
    def num_components(self) -> int:
        """The number K of matrices."""
        return self.count.shape[0]

    def apply(self, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """S_k v_k = 0."""
        return jnp.zeros_like(v)

    def resolvent(self, t: Time, v: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """v_k / (1-t): this family alone is singular at t = 1."""
        return v / (1.0 - t)

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t) = -d log(1-t)."""
        return jnp.broadcast_to(-dim * jnp.log(1.0 - jnp.asarray(t, self.count.dtype)), self.count.shape)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """Twice epsilon times the exponent of the potential; as a difference of points, which keeps its digits."""
        return jnp.sum(r * r, -1) - jnp.sum((x - r) ** 2, -1) / (1.0 - t)

    def color(self, noise: Float[Array, " k m"]) -> Float[Array, " k d"]:
        """One draw of N(0, S_k) for every component."""
        return jnp.zeros_like(noise)

    def dense(self, dim: int) -> Float[Array, " k d d"]:
        """Zeros."""
        return jnp.zeros((self.num_components, dim, dim), self.count.dtype)

    def law(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        """Point masses at the means."""
        del epsilon
        return dist.Delta(mean, event_dim=1)
