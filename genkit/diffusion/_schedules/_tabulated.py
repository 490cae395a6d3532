"""The schedule through a table of log signal-to-noise ratios."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real

from genkit._core._checks import check, check_finite, describe, is_concrete
from genkit.diffusion._schedules._base import Schedule, as_level, as_time
from genkit.diffusion._schedules._spline import Spline, monotone_slopes


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
        if not (np.diff(values) < 0).all():
            raise ValueError(f"`log_snr` must be strictly descending; got {describe(values)}. Noise grows with time.")
        t = np.linspace(0, 1, len(values))
        dtype = jnp.result_type(float)
        slopes = monotone_slopes(t, -values)
        self.spline = Spline(jnp.asarray(t, dtype), jnp.asarray(-values, dtype), jnp.asarray(slopes, dtype))

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-self.spline(as_time(t))))

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(self.spline(as_time(t))))

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.spline.inverse(2 * jnp.log(as_level(noise_level)))
