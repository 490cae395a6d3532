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
    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k(t) [r_k + (S_k - I) z]: the drift at `z` of the bridge whose only component is k.

        It equals (mean of the end point - z) / (1-t). One pass through the family: to apply S_k first and P_k after
        would multiply the rounding of S_k z by the condition of P_k.
        """

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

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k [r_k + (S_k - I) z]."""
        return self._p(t)[:, None] * (r + jnp.expm1(self.log_values)[:, None] * z)

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t)."""
        return dim * jnp.log(self._p(t))

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """Twice epsilon times the exponent of the potential."""
        p = self._p(t)
        return p * (jnp.expm1(self.log_values) * (x @ x) + 2.0 * (r @ x) - t * jnp.sum(r * r, -1))

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

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """P_k [r_k + (S_k - I) z]."""
        return self._p(t) * (r + jnp.expm1(self.log_values) * z)

    def logdet_resolvent(self, t: Time, dim: int) -> Float[Array, " k"]:
        """Log det P_k(t)."""
        del dim
        return jnp.sum(jnp.log(self._p(t)), -1)

    def exponent(self, t: Time, x: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k"]:
        """Twice epsilon times the exponent of the potential; matrix products when `t` is shared by a batch."""
        p = self._p(t)
        pr = p * r
        return (jnp.expm1(self.log_values) * p) @ (x * x) + 2.0 * (pr @ x) - t * jnp.sum(pr * r, -1)

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

    def pull(self, t: Time, z: Float[Array, " d"], r: Float[Array, " k d"]) -> Float[Array, " k d"]:
        """(r_k - z) / (1-t)."""
        return (r - z) / (1.0 - t)

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
