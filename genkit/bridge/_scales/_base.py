"""Covariance families of a mixture potential: K positive matrices S_k behind one small interface.

Everything a bridge needs from its covariances is S_k itself and the resolvent P_k(t) = ((1-t) I + t S_k)^-1, so a
family is chosen by how cheaply it applies these two. No family forms an inverse or divides by 1-t, except the one whose
bridge really does end in points.
"""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Int, Real


Time = Real[ArrayLike, ""]


class AbstractScale(eqx.Module):
    """K symmetric positive (semi-)definite matrices S_k of size d, as a mixture potential needs them.

    All methods work on one point; the leading axis of every array leaf is the component axis. `matrices` says that a
    component holds matrices, so that picking one component per sample would copy them.
    """

    matrices: ClassVar[bool] = False

    def noise_size(self, dim: int) -> int:
        """The number of standard normal numbers that `color` takes per component."""
        return dim

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
    def distribution(self, mean: Float[Array, " *b k d"], epsilon: Float[Array, ""]) -> dist.Distribution:
        """The numpyro distribution N(mean_k, epsilon S_k), batch shape `(*b, k)`, event shape (d,)."""

    @abc.abstractmethod
    def clipped(self, low: float, high: float) -> "AbstractScale":
        """The family with the logarithms of its eigenvalues held in a range; itself where it has none."""


class AbstractLogScale(AbstractScale):
    """A family whose parameters include logarithms of eigenvalues (or of a diagonal part), `log_values`."""

    log_values: eqx.AbstractVar[Float[Array, " k ..."]]

    @property
    def num_components(self) -> int:
        return self.log_values.shape[0]

    def clipped(self, low: float, high: float) -> "AbstractLogScale":
        return eqx.tree_at(lambda scale: scale.log_values, self, jnp.clip(self.log_values, low, high))

    def resolvent_values(self, t: Time) -> Float[Array, " k ..."]:
        """Eigenvalues of P_k(t)."""
        # A float64 time must not widen the whole evaluation.
        t = jnp.asarray(t, self.log_values.dtype)
        return 1.0 / ((1.0 - t) + t * jnp.exp(self.log_values))


def take(scale: AbstractScale, index: Int[ArrayLike, ""]) -> AbstractScale:
    """The family of the single component `index` (component axis kept, of size one)."""
    return jax.tree.map(lambda leaf: leaf[jnp.asarray(index)][None], scale)
