"""f-divergences with a parameter: the alpha family and total variation, exact or smoothed."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from genkit._core._checks import check_positive
from genkit._core._fields import as_number, maybe_number
from genkit.divergence._f_divergences._base import FDivergence, exp_times, real, refuse_kink
from genkit.divergence._f_divergences._from_functions import integrate_weight


class Alpha(FDivergence):
    r"""The alpha (Cressie-Read) divergence, $f = (r^a - 1 - a(r - 1)) / (a(a - 1))$; $h = r^a$.

    `a = 0` is the reverse and `a = 1` the forward KL (up to a multiple of r - 1), both reached continuously.

    Args:
        a: the order.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.Alpha(2.0).weight(jnp.log(3.0))), 4)
        9.0
    """

    a: Float[Array, ""] = eqx.field(converter=as_number)

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        a = self.a
        # f = (g(a) - a g(1)) / (a (a - 1)) with g(a) = e^(au) - 1 is 0/0 at a = 0 and a = 1: series take over there,
        # and the general formula sees an order that is safe, so that its gradient stays finite.
        near0 = jnp.abs(a) < 1e-4
        near1 = jnp.abs(a - 1) < 1e-4
        safe = jnp.where(near0 | near1, 0.5, a)
        general = (jnp.expm1(safe * u) - safe * jnp.expm1(u)) / (safe * (safe - 1))
        at0 = jnp.expm1(u) - u + a * (jnp.expm1(u) - u - u**2 / 2)
        at1 = exp_times(u, u) - jnp.expm1(u) + (a - 1) * (exp_times(u, u**2 / 2 - u) + jnp.expm1(u))
        return jnp.where(near0, at0, jnp.where(near1, at1, general))

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.exp(self.a * real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        # The Box-Cox logarithm of the ratio, with its series about order zero.
        near = jnp.abs(self.a) < 1e-6
        safe = jnp.where(near, 1.0, self.a)
        return jnp.where(near, u + self.a * u**2 / 2, jnp.expm1(safe * u) / safe)


class TotalVariation(FDivergence):
    r"""Total variation, $f = |r - 1| / 2$, or with `smoothing` the divergence of reward $\frac12\tanh(u / 2\tau)$.

    The exact one has no pathwise gradient: `weight` raises.

    Args:
        smoothing: tau, positive; None for the exact divergence.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.TotalVariation().phi(jnp.log(3.0))), 4)
        1.0
    """

    smoothing: Float[Array, ""] | None = eqx.field(converter=maybe_number, default=None)

    def __check_init__(self) -> None:
        if self.smoothing is not None:
            check_positive("smoothing", self.smoothing)

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        if self.smoothing is None:
            return jnp.abs(jnp.expm1(u)) / 2
        # No closed form: quadrature of the weight.
        return integrate_weight(self.weight, u, 128)

    @property
    def pathwise(self) -> bool:
        return self.smoothing is not None

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        if self.smoothing is None:
            refuse_kink("TotalVariation()")
        scaled = real(u) / (2 * self.smoothing)
        # cosh overflows in float32 beyond 88; at 40 the weight is zero to any precision.
        return 1 / (4 * self.smoothing * jnp.cosh(jnp.clip(scaled, -40.0, 40.0)) ** 2)

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        if self.smoothing is None:
            return jnp.sign(u) / 2
        return jnp.tanh(u / (2 * self.smoothing)) / 2
