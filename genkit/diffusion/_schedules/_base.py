"""Schedules: a pair (alpha, sigma) from which everything else about a Gaussian noising process is derived."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from genkit._core._checks import check_interval
from genkit._core._fields import as_number


# Where the clock starts for derived rates: at t = 0 exactly sigma * sigma_dot may be 0 * inf although its limit is
# finite (VP). The number only has to be small against every time one uses and its square root far from underflow.
_FIRST_INSTANT = 1e-30


class Schedule(eqx.Module):
    r"""A Gaussian noising process $x_t = \alpha_t x_0 + \sigma_t \varepsilon$, written for scalar or array times.

    `t = 0` is data and noise grows with `t`. Subclasses give `alpha`, `sigma` and `time`; the rest follows from them:

    $$\hat\sigma = \sigma/\alpha,\quad \text{log-SNR} = 2\log(\alpha/\sigma),\quad f = \dot\alpha/\alpha,\quad
      g^2 = 2\sigma\dot\sigma - 2 f \sigma^2 = \alpha^2\, d\hat\sigma^2/dt .$$

    Example:
        >>> import genkit as gk
        >>> schedule = gk.diffusion.CondOT()
        >>> float(schedule.noise_level(0.75)), float(schedule.time(3.0))
        (3.0, 0.75)

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    section 3; Kingma et al., "Variational Diffusion Models", NeurIPS 2021, section 3.
    """

    @abc.abstractmethod
    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data at time `t`."""

    @abc.abstractmethod
    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise at time `t`."""

    @abc.abstractmethod
    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Time at which `sigma / alpha` equals `noise_level`, in closed form.

        Args:
            noise_level: noise levels, non-negative. Levels beyond those of `t` in [0, 1] give times outside.

        Returns:
            Times, of the shape of `noise_level`.

        Raises:
            ValueError: for a negative level, where it is known.
        """

    def noise_level(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Noise level `sigma(t) / alpha(t)`, the coordinate in which denoisers and grids are written."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Logarithm of the signal-to-noise ratio, `log(alpha(t)^2 / sigma(t)^2)`."""
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def alpha_dot(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Rate of change of `alpha`; the velocity of a path is `alpha_dot * x0 + sigma_dot * eps`."""
        return _rate(self.alpha, t)

    def sigma_dot(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Rate of change of `sigma`; where it is infinite at `t = 0`, its value an instant later."""
        return _rate(self.sigma, t)

    def drift(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Factor `f(t)` of the noising equation `dx = f(t) x dt + g(t) dw`."""
        return self.alpha_dot(t) / self.alpha(t)

    def diffusion(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Factor `g(t)` of the noising equation `dx = f(t) x dt + g(t) dw`."""
        t = _after_zero(t)
        sigma = self.sigma(t)
        return jnp.sqrt(2 * sigma * (self.sigma_dot(t) - self.drift(t) * sigma))


def as_time(t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
    """Times as an array of a floating dtype."""
    return as_number(t)


def as_level(noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
    """Noise levels as an array of a floating dtype; negative ones are refused, where they are known."""
    check_interval("noise_level", noise_level, 0)
    return as_number(noise_level)


def split_at_one(
    level: Float[Array, " *s"],
) -> tuple[Bool[Array, " *s"], Float[Array, " *s"], Float[Array, " *s"]]:
    """Mask of the levels above 1, with the levels for a formula below 1 and for one above.

    Each formula sees 1 in place of the levels that are the other's, so that both have finite values and gradients.
    """
    far = level > 1
    near_level = jnp.where(far, 1, level)
    far_level = jnp.where(far, level, 1)
    return far, near_level, far_level


def _after_zero(t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
    """Times with exact zeros moved to the first instant."""
    t = as_time(t)
    return jnp.where(t == 0, jnp.asarray(_FIRST_INSTANT, t.dtype), t)


def _rate(function: Callable[[Array], Array], t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
    """Derivative of a function that acts on each time by itself."""
    t = _after_zero(t)
    # A forward derivative along ones: one pass, whatever the shape of the times.
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]
