"""Discrete tables of noising variances, and the continuous schedule through them."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real

from genkit._core._checks import check, check_choice, check_count, check_interval, describe, is_concrete
from genkit.diffusion._schedules._base import Schedule, as_level, as_time, split_at_one


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
        if not (values[:-1] < 1).all():
            raise ValueError(f"`betas` must be below 1 except the last; got {describe(values)}.")
        self.closed = bool(values[-1] == 1)
        if self.closed:
            values = values[:-1]
        # Summed in float64 on the host: products of a thousand factors near one lose digits in float32.
        total = np.concatenate([[0.0], np.cumsum(-np.log1p(-values))])
        self.integral = jnp.asarray(total, jnp.result_type(float))

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self._parts(t)[0]

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self._parts(t)[1]

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        level = as_level(noise_level)
        far, near_level, far_level = split_at_one(level)
        # log(1 + level^2), without overflow of the square.
        integral = jnp.where(far, 2 * jnp.log(far_level) + jnp.log1p(far_level**-2), jnp.log1p(near_level**2))
        table = self.integral.astype(level.dtype)
        t = _broken_line(integral, table, jnp.linspace(0, self._end, len(table), dtype=level.dtype))
        if not self.closed:
            return t
        # In the last cell alpha falls linearly to zero, and the time left in proportion to it.
        left = (1 - self._end) * jnp.exp(-0.5 * (integral - table[-1]))
        return jnp.where(integral > table[-1], 1 - left, t)

    @property
    def _end(self) -> float:
        """Time of the last finite entry."""
        if not self.closed:
            return 1.0
        steps = len(self.integral) - 1
        return steps / (steps + 1)

    def _parts(self, t: Real[ArrayLike, " *s"]) -> tuple[Array, Array]:
        """Scale of the data and standard deviation of the noise."""
        t = as_time(t)
        table = self.integral.astype(t.dtype)
        times = jnp.linspace(0, self._end, len(table), dtype=t.dtype)
        tail = (t > self._end) & self.closed
        integral = _broken_line(jnp.where(tail, 0, t), times, table)
        alpha = jnp.exp(-0.5 * integral)
        sigma = jnp.sqrt(-jnp.expm1(-integral))
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
