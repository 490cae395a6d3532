"""The named schedules, each in a form that keeps its relative accuracy in float32 at both ends of the noise range."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from genkit._core._checks import check, check_interval, check_positive, is_concrete
from genkit._core._fields import as_number

from ._schedules import Schedule, as_time


class EDM(Schedule):
    """Variance exploding with time itself as the noise level: `alpha = 1`, `sigma = t`, `t` in [0, inf).

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.EDM().noise_level(2.0))
        2.0

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1.
    """

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data, always one."""
        return jnp.ones_like(as_time(t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise, `t`."""
        return as_time(t)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The noise level itself."""
        return as_time(noise_level)


class VE(Schedule):
    """Variance exploding, geometric in time: `alpha = 1`, `sigma = sigma_min (sigma_max / sigma_min)^t`, `t` in [0, 1].

    Args:
        sigma_min: noise level at `t = 0`, positive.
        sigma_max: noise level at `t = 1`, above `sigma_min`.

    Example:
        >>> import genkit as gk
        >>> round(float(gk.diffusion.VE(0.01, 100.0).sigma(0.5)), 5)
        1.0

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 30.
    """

    sigma_min: Float[Array, ""] = eqx.field(converter=as_number)
    sigma_max: Float[Array, ""] = eqx.field(converter=as_number)

    def __check_init__(self):
        check_positive("sigma_min", self.sigma_min)
        _check_above("sigma_max", self.sigma_max, "sigma_min", self.sigma_min, strict=True)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data, always one."""
        return jnp.ones_like(as_time(t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise."""
        t = as_time(t)
        log_ratio = jnp.log(self.sigma_max / self.sigma_min).astype(t.dtype)
        return self.sigma_min.astype(t.dtype) * jnp.exp(t * log_ratio)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level; outside [sigma_min, sigma_max] it leaves [0, 1]."""
        level = as_time(noise_level)
        log_ratio = jnp.log(self.sigma_max / self.sigma_min).astype(level.dtype)
        return jnp.log(level / self.sigma_min.astype(level.dtype)) / log_ratio


class VP(Schedule):
    r"""Variance preserving with a linear rate: $\alpha = e^{-B/2}$, $\sigma^2 = 1 - e^{-B}$, `t` in [0, 1].

    $B(t) = \beta_{min} t + (\beta_{max} - \beta_{min}) t^2 / 2$ is the integrated rate.

    Args:
        beta_min: rate at `t = 0`, positive.
        beta_max: rate at `t = 1`, at least `beta_min`.

    Example:
        >>> import genkit as gk
        >>> schedule = gk.diffusion.VP()
        >>> round(float(schedule.alpha(0.3) ** 2 + schedule.sigma(0.3) ** 2), 6)
        1.0

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 32.
    """

    beta_min: Float[Array, ""] = eqx.field(converter=as_number, default=0.1)
    beta_max: Float[Array, ""] = eqx.field(converter=as_number, default=20.0)

    def __check_init__(self):
        check_positive("beta_min", self.beta_min)
        _check_above("beta_max", self.beta_max, "beta_min", self.beta_min)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data."""
        return jnp.exp(-0.5 * _integrated_rate(self.beta_min, self.beta_max, t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise; `expm1` keeps it exact where `1 - alpha^2` cancels."""
        return jnp.sqrt(-jnp.expm1(-_integrated_rate(self.beta_min, self.beta_max, t)))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level; above the level of `t = 1` it continues beyond 1."""
        integral = 2 * _log_hypot_one(as_time(noise_level))
        return _invert_integrated_rate(self.beta_min, self.beta_max, integral)


class SubVP(Schedule):
    r"""Sub-variance-preserving: $\alpha = e^{-B/2}$ as in `VP`, $\sigma = 1 - e^{-B}$, `t` in [0, 1].

    Args:
        beta_min: rate at `t = 0`, positive.
        beta_max: rate at `t = 1`, at least `beta_min`.

    Example:
        >>> import genkit as gk
        >>> schedule = gk.diffusion.SubVP()
        >>> round(float(schedule.sigma(1.0)), 4)
        1.0

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 28.
    """

    beta_min: Float[Array, ""] = eqx.field(converter=as_number, default=0.1)
    beta_max: Float[Array, ""] = eqx.field(converter=as_number, default=20.0)

    def __check_init__(self):
        check_positive("beta_min", self.beta_min)
        _check_above("beta_max", self.beta_max, "beta_min", self.beta_min)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data."""
        return jnp.exp(-0.5 * _integrated_rate(self.beta_min, self.beta_max, t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise."""
        return -jnp.expm1(-_integrated_rate(self.beta_min, self.beta_max, t))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level; the level is `2 sinh(B / 2)`."""
        integral = 2 * jnp.arcsinh(0.5 * as_time(noise_level))
        return _invert_integrated_rate(self.beta_min, self.beta_max, integral)


class CondOT(Schedule):
    """Straight paths between data and noise: `alpha = 1 - t`, `sigma = t`, `t` in [0, 1].

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.CondOT().alpha(0.25))
        0.75

    Source: Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, section 4.1 (there data is at `t = 1`).
    """

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data."""
        return 1 - as_time(t)

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise."""
        return as_time(t)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level; 1 at infinity."""
        level = as_time(noise_level)
        far = level > 1
        near_level, far_level = jnp.where(far, 1, level), jnp.where(far, level, 1)
        return jnp.where(far, 1 / (1 + 1 / far_level), near_level / (1 + near_level))


class Cosine(Schedule):
    r"""Cosine schedule: $\alpha = \cos\theta / \cos\theta_0$, $\alpha^2 + \sigma^2 = 1$, `t` in [0, 1].

    The angle is $\theta = \frac\pi2 \frac{t + s}{1 + s}$, and $\theta_0$ its value at `t = 0`.

    Args:
        s: offset that keeps the noise from vanishing too fast at `t = 0`; non-negative, 0 makes it a quarter circle.

    Example:
        >>> import genkit as gk
        >>> round(float(gk.diffusion.Cosine(s=0.0).noise_level(0.5)), 6)
        1.0

    Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, equation 17.
    """

    s: Float[Array, ""] = eqx.field(converter=as_number, default=0.008)

    def __check_init__(self):
        check_interval("s", self.s, 0.0)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data; written as a sine of the time left, so that it is exact near `t = 1`."""
        t = as_time(t)
        s = self.s.astype(t.dtype)
        return jnp.sin(0.5 * math.pi * (1 - t) / (1 + s)) / jnp.cos(_quarter(s, s))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise, from `cos^2 a - cos^2 b = sin(b - a) sin(b + a)`, which never cancels."""
        t = as_time(t)
        s = self.s.astype(t.dtype)
        return jnp.sqrt(jnp.sin(_quarter(t, s)) * jnp.sin(_quarter(t + 2 * s, s))) / jnp.cos(_quarter(s, s))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level; measured from the nearer end of the range, so that no digits are lost."""
        level = as_time(noise_level)
        s = self.s.astype(level.dtype)
        sin0, cos0 = jnp.sin(_quarter(s, s)), jnp.cos(_quarter(s, s))
        far = level > 1
        near_level, far_level = jnp.where(far, 1, level), jnp.where(far, level, 1)
        # tan(theta) cos0 = hypot(level, sin0); the root is kept from 0 where both vanish, for its gradient.
        square = near_level**2 + sin0**2
        root = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
        ratio = near_level / jnp.where(square == 0, 1, root + sin0)
        after_zero = jnp.arctan2(near_level * ratio * cos0, cos0**2 + root * sin0)
        before_one = jnp.arctan2(cos0, jnp.sqrt(far_level**2 + sin0**2))
        scale = (1 + s) / (0.5 * math.pi)
        return jnp.where(far, 1 - scale * before_one, scale * after_zero)


def _quarter(t: Float[Array, " *s"], s: Float[Array, ""]) -> Float[Array, " *s"]:
    """The angle of `t` on a quarter circle that `1 + s` fills."""
    return 0.5 * math.pi * t / (1 + s)


def _log_hypot_one(level: Float[Array, " *s"]) -> Float[Array, " *s"]:
    """`log sqrt(1 + level^2)` without overflow of the square."""
    far = level > 1
    near_level, far_level = jnp.where(far, 1, level), jnp.where(far, level, 1)
    return jnp.where(far, jnp.log(far_level) + 0.5 * jnp.log1p(far_level**-2), 0.5 * jnp.log1p(near_level**2))


def _integrated_rate(
    beta_min: Float[Array, ""], beta_max: Float[Array, ""], t: Real[ArrayLike, " *s"]
) -> Float[Array, " *s"]:
    """`B(t)`, the integral of the linear rate from 0 to `t`."""
    t = as_time(t)
    low, high = beta_min.astype(t.dtype), beta_max.astype(t.dtype)
    return t * (low + 0.5 * (high - low) * t)


def _invert_integrated_rate(
    beta_min: Float[Array, ""], beta_max: Float[Array, ""], integral: Float[Array, " *s"]
) -> Float[Array, " *s"]:
    """The time at which the integrated rate reaches `integral`, by the root formula that does not cancel."""
    low, high = beta_min.astype(integral.dtype), beta_max.astype(integral.dtype)
    return 2 * integral / (low + jnp.sqrt(low**2 + 2 * (high - low) * integral))


def _check_above(
    name: str, value: Float[Array, ""], other_name: str, other: Float[Array, ""], *, strict: bool = False
) -> None:
    """Refuse a value below (or, if strict, equal to) another, where both are known."""
    if is_concrete(value) and is_concrete(other):
        holds = bool(value > other) if strict else bool(value >= other)
        word = "above" if strict else "at least"
        check(holds, name, f"{word} `{other_name}` = {float(other):g}", f"{float(value):g}")
