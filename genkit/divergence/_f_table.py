"""The tabulated f-divergences, in closed form and stable in the log-ratio."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core._checks import check_positive
from ._f_base import FDivergence, from_weight, refuse_kink


LOG2 = math.log(2.0)


def _real(u: Any) -> Any:
    return jnp.asarray(u, jnp.result_type(float, jnp.asarray(u).dtype))


class ReverseKL(FDivergence):
    r"""Reverse KL, $f = -\log r$: mode seeking; the divergence of the ELBO."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return -u

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return jnp.ones_like(u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return u - 1


class ForwardKL(FDivergence):
    r"""Forward KL, $f = r\log r$: mass covering."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return u * jnp.exp(u)

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return jnp.exp(u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return jnp.exp(u)


class JensenShannon(FDivergence):
    r"""Twice the Jensen-Shannon divergence, $f = r\log r - (r+1)\log\frac{r+1}2$."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return u * jnp.exp(u) - (jnp.exp(u) + 1) * (jax.nn.softplus(u) - LOG2)

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return jax.nn.sigmoid(u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return jax.nn.softplus(u) - LOG2


class SoftenedReverseKL(FDivergence):
    r"""Softened reverse KL, $f = (r+1)\log\frac{r+1}{2r}$."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return (jnp.exp(u) + 1) * (jax.nn.softplus(-u) - LOG2)

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return jax.nn.sigmoid(-u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return LOG2 - jax.nn.softplus(-u) - 1


class SoftenedForwardKL(FDivergence):
    r"""Softened forward KL, $f = (r+1)\log\frac{r+1}2$."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return (jnp.exp(u) + 1) * (jax.nn.softplus(u) - LOG2)

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return jnp.exp(u) * jax.nn.sigmoid(u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return jnp.exp(u) - jax.nn.softplus(u) + LOG2


class SquaredHellinger(FDivergence):
    r"""Squared Hellinger, $f = (\sqrt r - 1)^2$."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return jnp.expm1(u / 2) ** 2

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return jnp.exp(u / 2) / 2

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return jnp.expm1(u / 2)


class PearsonChi2(FDivergence):
    r"""Pearson chi-squared, $f = (r - 1)^2$."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return jnp.expm1(u) ** 2

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return 2 * jnp.exp(2 * u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return jnp.expm1(2 * u)


class NeymanChi2(FDivergence):
    r"""Neyman chi-squared, $f = (r - 1)^2 / r$."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return jnp.exp(-u) * jnp.expm1(u) ** 2

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return 2 * jnp.exp(-u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return -2 * jnp.expm1(-u)


class Jeffreys(FDivergence):
    r"""Jeffreys, $f = (r - 1)\log r$."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return u * jnp.expm1(u)

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return 1 + jnp.exp(u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return jnp.expm1(u) + u


class LeCam(FDivergence):
    r"""Vincze-Le Cam, $f = (r - 1)^2 / (r + 1)$."""

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        return jnp.expm1(u) * jnp.tanh(u / 2)

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = _real(u)
        return 8 * jax.nn.sigmoid(u) ** 2 * jax.nn.sigmoid(-u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = _real(u)
        return 3 - 4 * jax.nn.sigmoid(-u) * (1 + jax.nn.sigmoid(u))


class Alpha(FDivergence):
    r"""The alpha (Cressie-Read) divergence, $f = (r^a - 1 - a(r - 1)) / (a(a - 1))$; $h = r^a$.

    `a = 0` is the reverse and `a = 1` the forward KL (up to a multiple of r - 1), both reached continuously.

    Args:
        a: the order.
    """

    a: Shaped[Array, ""] = eqx.field(converter=jnp.asarray)

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = _real(u)
        # f = (g(a) - a g(1)) / (a (a - 1)) with g(a) = e^(au) - 1; the limits at 0 and 1 are taken apart
        a = self.a
        near0, near1 = jnp.abs(a) < 1e-4, jnp.abs(a - 1) < 1e-4
        safe = jnp.where(near0 | near1, 0.5, a)
        general = (jnp.expm1(safe * u) - safe * jnp.expm1(u)) / (safe * (safe - 1))
        at0 = jnp.expm1(u) - u + a * (jnp.expm1(u) - u - u**2 / 2)
        at1 = u * jnp.exp(u) - jnp.expm1(u) + (a - 1) * (jnp.exp(u) * (u**2 / 2 - u) + jnp.expm1(u))
        return jnp.where(near0, at0, jnp.where(near1, at1, general))

    @property
    def pathwise(self) -> bool:
        """True."""
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """r^a."""
        return jnp.exp(self.a * _real(u))

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The Box-Cox logarithm of the ratio."""
        u = _real(u)
        near = jnp.abs(self.a) < 1e-6
        safe = jnp.where(near, 1.0, self.a)
        return jnp.where(near, u + self.a * u**2 / 2, jnp.expm1(safe * u) / safe)


class TotalVariation(FDivergence):
    r"""Total variation, $f = |r - 1| / 2$, or with `smoothing` the divergence of reward $\frac12\tanh(u / 2\tau)$.

    The exact one has no pathwise gradient: `weight` raises.

    Args:
        smoothing: tau, positive; None for the exact divergence.
    """

    smoothing: Any = None

    def __check_init__(self) -> None:
        """Validate the width."""
        if self.smoothing is not None:
            check_positive("smoothing", self.smoothing)

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio; the smoothed one by quadrature of its weight."""
        u = _real(u)
        if self.smoothing is None:
            return jnp.abs(jnp.expm1(u)) / 2
        return from_weight(self.weight, num_nodes=128).phi(u)

    @property
    def pathwise(self) -> bool:
        """Whether it is smoothed."""
        return self.smoothing is not None

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients, for the smoothed divergence."""
        if self.smoothing is None:
            refuse_kink("TotalVariation()")
        scaled = _real(u) / (2 * self.smoothing)
        return 1 / (4 * self.smoothing * jnp.cosh(jnp.clip(scaled, -40.0, 40.0)) ** 2)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Half the sign of the log-ratio, or its smooth version."""
        u = _real(u)
        return jnp.sign(u) / 2 if self.smoothing is None else jnp.tanh(u / (2 * self.smoothing)) / 2
