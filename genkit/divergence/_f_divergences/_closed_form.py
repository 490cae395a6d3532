"""The tabulated f-divergences, in closed form and stable in the log-ratio."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from genkit.divergence._f_divergences._base import FDivergence, exp_times, real


LOG2 = math.log(2.0)


class ReverseKL(FDivergence):
    r"""Reverse KL, $f = -\log r$: mode seeking; the divergence of the ELBO.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.ReverseKL().weight(jnp.log(3.0))), 4)
        1.0
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return -real(u)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.ones_like(real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return real(u) - 1


class ForwardKL(FDivergence):
    r"""Forward KL, $f = r\log r$: mass covering.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.ForwardKL().weight(jnp.log(3.0))), 4)
        3.0
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return exp_times(u, u)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.exp(real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.exp(real(u))


class JensenShannon(FDivergence):
    r"""Twice the Jensen-Shannon divergence, $f = r\log r - (r+1)\log\frac{r+1}2$.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.JensenShannon().weight(jnp.log(3.0))), 4)
        0.75
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        # Sorted by the ratio: its logarithm would cancel against that of the mean where the ratio is large.
        return exp_times(u, LOG2 - jax.nn.softplus(-u)) - (jax.nn.softplus(u) - LOG2)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jax.nn.sigmoid(real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jax.nn.softplus(real(u)) - LOG2


class SoftenedReverseKL(FDivergence):
    r"""Softened reverse KL, $f = (r+1)\log\frac{r+1}{2r}$.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.SoftenedReverseKL().weight(jnp.log(3.0))), 4)
        0.25
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return (jnp.exp(u) + 1) * (jax.nn.softplus(-u) - LOG2)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jax.nn.sigmoid(-real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return LOG2 - jax.nn.softplus(-real(u)) - 1


class SoftenedForwardKL(FDivergence):
    r"""Softened forward KL, $f = (r+1)\log\frac{r+1}2$.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.SoftenedForwardKL().weight(jnp.log(3.0))), 4)
        2.25
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return (jnp.exp(u) + 1) * (jax.nn.softplus(u) - LOG2)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return jnp.exp(u) * jax.nn.sigmoid(u)

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return jnp.exp(u) - jax.nn.softplus(u) + LOG2


class SquaredHellinger(FDivergence):
    r"""Squared Hellinger, $f = (\sqrt r - 1)^2$.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.SquaredHellinger().weight(jnp.log(3.0))), 4)
        0.866
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.expm1(real(u) / 2) ** 2

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.exp(real(u) / 2) / 2

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.expm1(real(u) / 2)


class PearsonChi2(FDivergence):
    r"""Pearson chi-squared, $f = (r - 1)^2$.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.PearsonChi2().weight(jnp.log(3.0))), 4)
        18.0
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.expm1(real(u)) ** 2

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return 2 * jnp.exp(2 * real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.expm1(2 * real(u))


class NeymanChi2(FDivergence):
    r"""Neyman chi-squared, $f = (r - 1)^2 / r$.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.NeymanChi2().weight(jnp.log(3.0))), 4)
        0.6667
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return jnp.exp(-u) * jnp.expm1(u) ** 2

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return 2 * jnp.exp(-real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return -2 * jnp.expm1(-real(u))


class Jeffreys(FDivergence):
    r"""Jeffreys, $f = (r - 1)\log r$.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.Jeffreys().weight(jnp.log(3.0))), 4)
        4.0
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return u * jnp.expm1(u)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return 1 + jnp.exp(real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return jnp.expm1(u) + u


class LeCam(FDivergence):
    r"""Vincze-Le Cam, $f = (r - 1)^2 / (r + 1)$.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.LeCam().weight(jnp.log(3.0))), 4)
        1.125
    """

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return jnp.expm1(u) * jnp.tanh(u / 2)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return 8 * jax.nn.sigmoid(u) ** 2 * jax.nn.sigmoid(-u)

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return 3 - 4 * jax.nn.sigmoid(-u) * (1 + jax.nn.sigmoid(u))
