"""Further schedules: from a table of log signal-to-noise ratios, polynomial, shifted, and discrete."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real

from genkit._core._checks import (
    check,
    check_choice,
    check_count,
    check_finite,
    check_interval,
    check_positive,
    describe,
    is_concrete,
)
from genkit._core._fields import as_number

from ._schedules import Schedule, as_time
from ._spline import Spline, monotone_slopes


class Tabulated(Schedule):
    r"""A variance-preserving schedule through given log signal-to-noise ratios at uniform times in [0, 1].

    Between them the ratio is a monotone rational spline, with a continuous derivative and an inverse in closed form;
    beyond them it goes on linearly. $\alpha^2 = \mathrm{sigmoid}(\text{log-SNR})$, $\sigma^2 = 1 - \alpha^2$.

    Args:
        log_snr: values at `t = 0`, ..., `t = 1`; at least two, strictly descending, finite.

    Raises:
        ValueError: if the values do not descend.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> schedule = gk.diffusion.Tabulated(jnp.array([8.0, 2.0, -6.0]))
        >>> round(float(schedule.log_snr(0.5)), 4)
        2.0

    Source: Kingma et al., "Variational Diffusion Models", NeurIPS 2021, section 3.2 (schedules in log-SNR); Gregory and
    Delbourgo, "Piecewise Rational Quadratic Interpolation to Monotonic Data", IMA J. Numer. Anal. 1982.
    """

    spline: Spline

    def __init__(self, log_snr: Float[ArrayLike, " k"]):
        check(is_concrete(log_snr), "log_snr", "concrete, because slopes are computed on the host", "a traced value")
        values = np.asarray(log_snr, np.float64)
        check(values.ndim == 1 and len(values) >= 2, "log_snr", "at least two values", f"shape {values.shape}")
        check_finite("log_snr", values)
        descends = bool((np.diff(values) < 0).all())
        check(descends, "log_snr", "strictly descending", describe(values), "Noise grows with time.")
        t = np.linspace(0, 1, len(values))
        dtype = jnp.result_type(float)
        parts = (t, -values, monotone_slopes(t, -values))
        self.spline = Spline(*(jnp.asarray(part, dtype) for part in parts))

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data."""
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-self.spline(as_time(t))))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise."""
        return jnp.exp(0.5 * jax.nn.log_sigmoid(self.spline(as_time(t))))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level."""
        return self.spline.inverse(2 * jnp.log(as_time(noise_level)))


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
        """Scale of the data; `expm1` keeps it exact near `t = 1`."""
        t = as_time(t)
        zero = t == 0
        power = -jnp.expm1(self.degree.astype(t.dtype) * jnp.log(jnp.where(zero, 1, t)))
        return jnp.where(zero, 1, power)

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise."""
        t = as_time(t)
        return t ** self.degree.astype(t.dtype)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level."""
        level = as_time(noise_level)
        far = level > 1
        near_level, far_level = jnp.where(far, 1, level), jnp.where(far, level, 1)
        power = 1 / self.degree.astype(level.dtype)
        return jnp.where(far, jnp.exp(-power * jnp.log1p(1 / far_level)), (near_level / (1 + near_level)) ** power)


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
        """Scale of the data."""
        return self.schedule.alpha(self._moved(t))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise."""
        return self.schedule.sigma(self._moved(t))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level."""
        level = as_time(noise_level)
        return self.schedule.time(level / self.shift.astype(level.dtype))

    def _moved(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time at which the schedule reaches the shifted level."""
        t = as_time(t)
        return self.schedule.time(self.shift.astype(t.dtype) * self.schedule.noise_level(t))


class Discrete(Schedule):
    r"""The continuous schedule through a discrete table of noising variances, as DDPM has.

    Step $i$ of $N$ is at $t = i/N$, where $\alpha^2 = \prod_{j \le i} (1 - \beta_j)$ exactly; in between the rate of
    the noising equation is constant. A table that ends in $\beta_N = 1$ (no signal left) ends in a cell where
    $\alpha$ falls linearly to zero.

    Args:
        betas: variances $\beta_1, \dots, \beta_N$ in (0, 1); the last may be 1.

    Raises:
        ValueError: for a variance out of range.

    Example:
        >>> import genkit as gk
        >>> schedule = gk.diffusion.Discrete(gk.diffusion.ddpm_betas(1000))
        >>> round(float(schedule.alpha(1.0) ** 2), 7)
        4.04e-05

    Source: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equation 4; Lin et al.,
    "Common Diffusion Noise Schedules and Sample Steps Are Flawed", WACV 2024 (zero terminal signal).
    """

    integral: Float[Array, " k"]  # minus the logarithm of alpha^2 at 0, 1/N, ..., as far as it is finite
    closed: bool = eqx.field(static=True)

    def __init__(self, betas: Float[ArrayLike, " n"]):
        check(is_concrete(betas), "betas", "concrete", "a traced value")
        values = np.asarray(betas, np.float64)
        check(values.ndim == 1 and len(values) >= 2, "betas", "at least two variances", f"shape {values.shape}")
        check_interval("betas", values, 0, 1, open_lo=True)
        check(bool((values[:-1] < 1).all()), "betas", "below 1 except the last", describe(values))
        self.closed = bool(values[-1] == 1)
        kept = values[:-1] if self.closed else values
        total = np.concatenate([[0.0], np.cumsum(-np.log1p(-kept))])
        self.integral = jnp.asarray(total, jnp.result_type(float))

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data."""
        return self._parts(t)[0]

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise."""
        return self._parts(t)[1]

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level; beyond the table the rate of the last step goes on."""
        level = as_time(noise_level)
        far = level > 1
        near_level, far_level = jnp.where(far, 1, level), jnp.where(far, level, 1)
        integral = jnp.where(far, 2 * jnp.log(far_level) + jnp.log1p(far_level**-2), jnp.log1p(near_level**2))
        table = self.integral.astype(level.dtype)
        t = _broken_line(integral, table, jnp.linspace(0, self._end, len(table), dtype=level.dtype))
        if not self.closed:
            return t
        left = (1 - self._end) * jnp.exp(-0.5 * (integral - table[-1]))
        return jnp.where(integral > table[-1], 1 - left, t)

    @property
    def _end(self) -> float:
        """Time of the last finite entry."""
        steps = len(self.integral) - 1
        return steps / (steps + 1) if self.closed else 1.0

    def _parts(self, t: Real[ArrayLike, " *s"]) -> tuple[Array, Array]:
        """`alpha` and `sigma`."""
        t = as_time(t)
        table = self.integral.astype(t.dtype)
        times = jnp.linspace(0, self._end, len(table), dtype=t.dtype)
        tail = (t > self._end) & self.closed
        integral = _broken_line(jnp.where(tail, 0, t), times, table)
        alpha, sigma = jnp.exp(-0.5 * integral), jnp.sqrt(-jnp.expm1(-integral))
        if not self.closed:
            return alpha, sigma
        last = jnp.exp(-0.5 * table[-1]) * (1 - jnp.where(tail, t, 1)) / (1 - self._end)
        return jnp.where(tail, last, alpha), jnp.where(tail, jnp.sqrt((1 - last) * (1 + last)), sigma)


def ddpm_betas(
    num_steps: int = 1000, kind: str = "linear", beta_min: float = 1e-4, beta_max: float = 0.02
) -> Float[np.ndarray, " n"]:
    r"""The published tables of discrete noising variances.

    Args:
        num_steps: length of the table.
        kind: `"linear"` in $\beta$, `"scaled_linear"` in $\sqrt\beta$, or `"cosine"` (clipped at 0.999; takes no ends).
        beta_min: first variance.
        beta_max: last variance, below 1.

    Returns:
        float64 array `(num_steps,)`.

    Raises:
        ValueError: for an unknown kind or variances out of range.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.ddpm_betas(3).tolist()
        [0.0001, 0.01005, 0.02]

    Source: Ho, Jain and Abbeel, NeurIPS 2020, section 4; Nichol and Dhariwal, ICML 2021, equation 17; Rombach et al.,
    CVPR 2022 (scaled linear).
    """
    check_count("num_steps", num_steps, 2)
    check_choice("kind", kind, ("linear", "scaled_linear", "cosine"))
    check_interval("beta_min", beta_min, 0, 1, open_lo=True, open_hi=True)
    check_interval("beta_max", beta_max, beta_min, 1, open_hi=True)
    if kind == "linear":
        return np.linspace(beta_min, beta_max, num_steps)
    if kind == "scaled_linear":
        return np.linspace(np.sqrt(beta_min), np.sqrt(beta_max), num_steps) ** 2
    signal = np.cos(0.5 * np.pi * (np.arange(num_steps + 1) / num_steps + 0.008) / 1.008) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)


def zero_terminal_snr(betas: Float[ArrayLike, " n"]) -> Float[np.ndarray, " n"]:
    r"""Rescale a table of variances so that no signal is left at its end.

    $\sqrt{\bar\alpha_i}$ is shifted to vanish at the last step and scaled to keep its first value.

    Args:
        betas: variances in (0, 1), at least two.

    Returns:
        float64 array of the same length whose last entry is 1.

    Raises:
        ValueError: for a variance out of range.

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.zero_terminal_snr(gk.diffusion.ddpm_betas(10))[-1])
        1.0

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are Flawed", WACV 2024, algorithm 1.
    """
    values = np.asarray(betas, np.float64)
    check(values.ndim == 1 and len(values) >= 2, "betas", "at least two variances", f"shape {values.shape}")
    check_interval("betas", values, 0, 1, open_lo=True, open_hi=True)
    root = np.sqrt(np.cumprod(1 - values))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    square = root**2
    return 1 - np.concatenate([square[:1], square[1:] / square[:-1]])


def _broken_line(at: Array, x: Array, y: Array) -> Array:
    """Piecewise linear interpolation through increasing points, the last piece going on."""
    cell = jnp.clip(jnp.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    return y[cell] + (at - x[cell]) * (y[cell + 1] - y[cell]) / (x[cell + 1] - x[cell])
