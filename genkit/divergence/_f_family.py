"""f-divergences with a parameter: the alpha family and total variation, exact or smoothed."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core._checks import check_positive
from .._core._fields import maybe_number
from ._f_base import FDivergence, refuse_kink
from ._f_table import real
from ._f_user import integrate_weight


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

    a: Shaped[Array, ""] = eqx.field(converter=jnp.asarray)

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio."""
        u = real(u)
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
        return jnp.exp(self.a * real(u))

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The Box-Cox logarithm of the ratio."""
        u = real(u)
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
        """Validate the width."""
        if self.smoothing is not None:
            check_positive("smoothing", self.smoothing)

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """F of the ratio; the smoothed one by quadrature of its weight."""
        u = real(u)
        if self.smoothing is None:
            return jnp.abs(jnp.expm1(u)) / 2
        return integrate_weight(self.weight, u, 128)

    @property
    def pathwise(self) -> bool:
        """Whether it is smoothed."""
        return self.smoothing is not None

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients, for the smoothed divergence."""
        if self.smoothing is None:
            refuse_kink("TotalVariation()")
        scaled = real(u) / (2 * self.smoothing)
        return 1 / (4 * self.smoothing * jnp.cosh(jnp.clip(scaled, -40.0, 40.0)) ** 2)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Half the sign of the log-ratio, or its smooth version."""
        u = real(u)
        return jnp.sign(u) / 2 if self.smoothing is None else jnp.tanh(u / (2 * self.smoothing)) / 2
