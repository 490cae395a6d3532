"""Grids: descending noise levels, float64, made on the host."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check, check_count, check_finite, check_interval, check_positive, describe, is_concrete


Grid = Float[np.ndarray, " _levels"]


@runtime_checkable
class _Clock(Protocol):
    def noise_level(self, t: Any) -> Any: ...


def check_grid(grid: Any) -> Grid:
    """Return `grid` as a float64 array, refusing anything that does not descend to zero or stop above it."""
    check(
        is_concrete(grid), "grid", "a concrete array, because coefficients are computed on the host", "a traced value"
    )
    try:
        levels = np.asarray(grid, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`grid` must be an array of noise levels; got {describe(grid)}.") from error
    check(
        levels.ndim == 1 and levels.size >= 2, "grid", "one row of at least two noise levels", f"shape {levels.shape}"
    )
    check_finite("grid", levels)
    rises = np.flatnonzero(np.diff(levels) >= 0)
    if rises.size:
        i = int(rises[0])
        got = f"grid[{i}] = {levels[i]:g}, grid[{i + 1}] = {levels[i + 1]:g}"
        check(False, "grid", "strictly descending", got, "Noise levels go from large to small.")
    check_interval("grid", levels, 0)
    return levels


def _ends(sigma_min: Any, sigma_max: Any, num_steps: int, final: float | None) -> tuple[float, float]:
    check_count("num_steps", num_steps, 2 if final is None else 1)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        check(is_concrete(value), name, "a concrete number, because grids are computed on the host", "a traced value")
        check_finite(name, np.asarray(value, np.float64))
        check_positive(name, value)
    low, high = float(sigma_min), float(sigma_max)
    check(low < high, "sigma_min", "smaller than `sigma_max`", f"{low:g} >= {high:g}")
    return low, high


def _close(levels: Grid, final: float | None) -> Grid:
    return check_grid(levels if final is None else np.append(levels, float(final)))


def karras(
    num_steps: int,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    rho: float = 7.0,
    final: float | None = 0.0,
) -> Grid:
    r"""Noise levels uniform in $\sigma^{1/\rho}$: many small levels, few large ones.

    $$\sigma_i = \bigl(\sigma_{max}^{1/\rho}
      + \tfrac{i}{n-1} (\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho})\bigr)^\rho, \quad i = 0, \dots, n - 1.$$

    Args:
        num_steps: number $n$ of levels from `sigma_max` to `sigma_min`.
        sigma_min: smallest level, positive.
        sigma_max: largest level, above `sigma_min`.
        rho: exponent $\rho$, positive; 7 is the published choice.
        final: level appended at the end, below `sigma_min`; `None` appends none.

    Returns:
        float64 array `(num_steps + 1,)`, or `(num_steps,)` where `final` is `None`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.karras(3, 0.1, 10.0).round(3).tolist()
        [10.0, 1.451, 0.1, 0.0]

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    equation 5.
    """
    low, high = _ends(sigma_min, sigma_max, num_steps, final)
    check_positive("rho", rho)
    root = np.linspace(high ** (1 / rho), low ** (1 / rho), num_steps)
    return _close(_pin(root**rho, high, low), final)


def log_uniform(
    num_steps: int,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    final: float | None = 0.0,
) -> Grid:
    """Noise levels of equal ratio, that is uniform in the log signal-to-noise ratio.

    Args:
        num_steps: number of levels from `sigma_max` to `sigma_min`.
        sigma_min: smallest level, positive.
        sigma_max: largest level, above `sigma_min`.
        final: level appended at the end, below `sigma_min`; `None` appends none.

    Returns:
        float64 array `(num_steps + 1,)`, or `(num_steps,)` where `final` is `None`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.log_uniform(3, 0.1, 10.0).round(6).tolist()
        [10.0, 1.0, 0.1, 0.0]

    Source: Lu et al., "DPM-Solver", NeurIPS 2022, section 3.
    """
    low, high = _ends(sigma_min, sigma_max, num_steps, final)
    return _close(_pin(np.exp(np.linspace(np.log(high), np.log(low), num_steps)), high, low), final)


def time_uniform(schedule: _Clock, num_steps: int, *, t_min: float, t_max: float, final: float | None = 0.0) -> Grid:
    """Noise levels at equally spaced times of a schedule.

    Args:
        schedule: anything with `noise_level(t)`, such as the schedules of `genkit.diffusion`.
        num_steps: number of levels from `noise_level(t_max)` to `noise_level(t_min)`.
        t_min: last time.
        t_max: first time, above `t_min`.
        final: level appended at the end; `None` appends none.

    Returns:
        float64 array `(num_steps + 1,)`, or `(num_steps,)` where `final` is `None`.

    Raises:
        ValueError: if the times are out of order or their noise levels do not descend.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.time_uniform(gkd.EDM(), 3, t_min=1.0, t_max=3.0).tolist()
        [3.0, 2.0, 1.0, 0.0]
    """
    check_count("num_steps", num_steps, 2 if final is None else 1)
    check(float(t_min) < float(t_max), "t_min", "smaller than `t_max`", f"{t_min:g} >= {t_max:g}")
    times = np.linspace(float(t_max), float(t_min), num_steps)
    levels = np.array([float(schedule.noise_level(t)) for t in times])
    hint = "Choose `t_max` where the noise level is finite."
    check(bool(np.isfinite(levels).all()), "t_max", "a time of finite noise level", f"levels {levels[:3]}", hint)
    return _close(levels, final)


def _pin(levels: Grid, high: float, low: float) -> Grid:
    """Set the ends exactly, which roots and exponentials miss by a rounding error."""
    levels[-1] = low
    levels[0] = high
    return levels
