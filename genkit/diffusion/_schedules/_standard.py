"""The named schedules, each in a form that keeps its relative accuracy in float32 at both ends of the noise range."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from genkit._core._checks import check, check_interval, check_positive, describe, is_concrete
from genkit._core._fields import as_number
from genkit.diffusion._schedules._base import Schedule, as_level, as_time, split_at_one


class EDM(Schedule):
    """Variance exploding with time itself as the noise level: `alpha = 1`, `sigma = t`, `t` in [0, inf).

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.EDM().noise_level(2.0))
        2.0

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1.
    """

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.ones_like(as_time(t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return as_time(t)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return as_level(noise_level)


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
        _check_above("sigma_max", self.sigma_max, "sigma_min", self.sigma_min)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.ones_like(as_time(t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        t = as_time(t)
        log_ratio = jnp.log(self.sigma_max / self.sigma_min).astype(t.dtype)
        return self.sigma_min.astype(t.dtype) * jnp.exp(t * log_ratio)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        level = as_level(noise_level)
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
        _check_at_least("beta_max", self.beta_max, "beta_min", self.beta_min)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.exp(-0.5 * _integrated_rate(self.beta_min, self.beta_max, t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # expm1 keeps it exact where 1 - alpha^2 cancels.
        return jnp.sqrt(-jnp.expm1(-_integrated_rate(self.beta_min, self.beta_max, t)))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        integral = 2 * _log_hypot_one(as_level(noise_level))
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
        _check_at_least("beta_max", self.beta_max, "beta_min", self.beta_min)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.exp(-0.5 * _integrated_rate(self.beta_min, self.beta_max, t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return -jnp.expm1(-_integrated_rate(self.beta_min, self.beta_max, t))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # The level is 2 sinh(B / 2).
        integral = 2 * jnp.arcsinh(0.5 * as_level(noise_level))
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
        return 1 - as_time(t)

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return as_time(t)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        level = as_level(noise_level)
        far, near_level, far_level = split_at_one(level)
        return jnp.where(far, 1 / (1 + 1 / far_level), near_level / (1 + near_level))


class Polynomial(Schedule):
    """Straight paths run at polynomial speed: `alpha = 1 - t^degree`, `sigma = t^degree`, `t` in [0, 1].

    Args:
        degree: the exponent, positive; 1 is `CondOT`.

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.Polynomial(2.0).sigma(0.5))
        0.25

    Source: Lipman et al., "Flow Matching Guide and Code", 2024, section 4.6 (polynomial convex schedulers).
    """

    degree: Float[Array, ""] = eqx.field(converter=as_number, default=2.0)

    def __check_init__(self):
        check_positive("degree", self.degree)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        t = as_time(t)
        # expm1 keeps 1 - t^degree exact near t = 1; the logarithm is kept from zero for its gradient.
        zero = t == 0
        power = -jnp.expm1(self.degree.astype(t.dtype) * jnp.log(jnp.where(zero, 1, t)))
        return jnp.where(zero, 1, power)

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        t = as_time(t)
        return t ** self.degree.astype(t.dtype)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        level = as_level(noise_level)
        far, near_level, far_level = split_at_one(level)
        power = 1 / self.degree.astype(level.dtype)
        return jnp.where(far, jnp.exp(-power * jnp.log1p(1 / far_level)), (near_level / (1 + near_level)) ** power)


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
        # A sine of the time left, which is exact near t = 1 where the cosine cancels.
        t = as_time(t)
        s = self.s.astype(t.dtype)
        return jnp.sin(0.5 * math.pi * (1 - t) / (1 + s)) / jnp.cos(_quarter(s, s))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # cos^2 a - cos^2 b = sin(b - a) sin(b + a), which never cancels.
        t = as_time(t)
        s = self.s.astype(t.dtype)
        return jnp.sqrt(jnp.sin(_quarter(t, s)) * jnp.sin(_quarter(t + 2 * s, s))) / jnp.cos(_quarter(s, s))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # Measured from the nearer end of the range, so that no digits are lost.
        level = as_level(noise_level)
        s = self.s.astype(level.dtype)
        sin0 = jnp.sin(_quarter(s, s))
        cos0 = jnp.cos(_quarter(s, s))
        far, near_level, far_level = split_at_one(level)
        # tan(theta) cos0 = hypot(level, sin0); the root is kept from 0 where both vanish, for its gradient.
        square = near_level**2 + sin0**2
        root = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
        ratio = near_level / jnp.where(square == 0, 1, root + sin0)
        after_zero = jnp.arctan2(near_level * ratio * cos0, cos0**2 + root * sin0)
        before_one = jnp.arctan2(cos0, jnp.sqrt(far_level**2 + sin0**2))
        scale = (1 + s) / (0.5 * math.pi)
        return jnp.where(far, 1 - scale * before_one, scale * after_zero)


class Shifted(Schedule):
    r"""Another schedule run late: at each time the noise level is `shift` times as large.

    On `CondOT` this is the time shift $t \mapsto kt / (1 + (k - 1) t)$; on `Cosine` it adds $-2 \log k$ to the log
    signal-to-noise ratio, with $k$ the ratio of resolutions.

    Args:
        schedule: the schedule to shift.
        shift: the factor, positive; above 1 more of the time is spent at large noise.

    Example:
        >>> import genkit as gk
        >>> round(float(gk.diffusion.Shifted(gk.diffusion.CondOT(), 3.0).sigma(0.5)), 6)
        0.75

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024, equation
    23; Hoogeboom et al., "Simple Diffusion", ICML 2023, section 3.2.
    """

    schedule: Schedule
    shift: Float[Array, ""] = eqx.field(converter=as_number)

    def __check_init__(self):
        check(isinstance(self.schedule, Schedule), "schedule", "a `genkit.Schedule`", describe(self.schedule))
        check_positive("shift", self.shift)

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.schedule.alpha(self._moved(t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.schedule.sigma(self._moved(t))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        level = as_level(noise_level)
        return self.schedule.time(level / self.shift.astype(level.dtype))

    def _moved(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Time at which the schedule reaches the shifted level."""
        t = as_time(t)
        return self.schedule.time(self.shift.astype(t.dtype) * self.schedule.noise_level(t))


def _quarter(t: Float[Array, " *s"], s: Float[Array, ""]) -> Float[Array, " *s"]:
    """The angle of `t` on a quarter circle that `1 + s` fills."""
    return 0.5 * math.pi * t / (1 + s)


def _log_hypot_one(level: Float[Array, " *s"]) -> Float[Array, " *s"]:
    """`log sqrt(1 + level^2)` without overflow of the square."""
    far, near_level, far_level = split_at_one(level)
    return jnp.where(far, jnp.log(far_level) + 0.5 * jnp.log1p(far_level**-2), 0.5 * jnp.log1p(near_level**2))


def _integrated_rate(
    beta_min: Float[Array, ""], beta_max: Float[Array, ""], t: Real[ArrayLike, " *s"]
) -> Float[Array, " *s"]:
    """`B(t)`, the integral of the linear rate from 0 to `t`."""
    t = as_time(t)
    low = beta_min.astype(t.dtype)
    high = beta_max.astype(t.dtype)
    return t * (low + 0.5 * (high - low) * t)


def _invert_integrated_rate(
    beta_min: Float[Array, ""], beta_max: Float[Array, ""], integral: Float[Array, " *s"]
) -> Float[Array, " *s"]:
    """The time at which the integrated rate reaches `integral`, for a rate linear in time."""
    low = beta_min.astype(integral.dtype)
    high = beta_max.astype(integral.dtype)
    # The root formula divides by a sum, so that it does not cancel where the integral is small.
    return 2 * integral / (low + jnp.sqrt(low**2 + 2 * (high - low) * integral))


def _check_above(name: str, value: Float[Array, ""], other_name: str, other: Float[Array, ""]) -> None:
    """Refuse a value that is not above another, where both are known."""
    if not (is_concrete(value) and is_concrete(other)):
        return
    if not bool(value > other):
        raise ValueError(f"`{name}` must be above `{other_name}` = {float(other):g}; got {float(value):g}.")


def _check_at_least(name: str, value: Float[Array, ""], other_name: str, other: Float[Array, ""]) -> None:
    """Refuse a value below another, where both are known."""
    if not (is_concrete(value) and is_concrete(other)):
        return
    if not bool(value >= other):
        raise ValueError(f"`{name}` must be at least `{other_name}` = {float(other):g}; got {float(value):g}.")
