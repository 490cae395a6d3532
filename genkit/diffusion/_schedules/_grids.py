"""Grids: descending noise levels, float64, made on the host."""

from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check, check_count, check_finite, check_interval, check_positive, describe, is_concrete
from genkit.diffusion._schedules._base import Schedule


Grid = Float[np.ndarray, " _levels"]


@runtime_checkable
class _Clock(Protocol):
    """Anything that tells the noise level of a time, such as a `Schedule`."""

    def noise_level(self, t: float) -> ArrayLike: ...


def check_grid(grid: object) -> Grid:
    """Return `grid` as a float64 array, refusing anything that does not descend to zero or stop above it."""
    check(
        is_concrete(grid), "grid", "a concrete array, because coefficients are computed on the host", "a traced value"
    )
    try:
        levels = np.asarray(grid, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`grid` must be an array of noise levels; got {describe(grid)}.") from error
    if levels.ndim != 1 or levels.size < 2:
        raise ValueError(f"`grid` must be one row of at least two noise levels; got shape {levels.shape}.")
    check_finite("grid", levels)
    rises = np.flatnonzero(np.diff(levels) >= 0)
    if rises.size:
        i = int(rises[0])
        raise ValueError(
            f"`grid` must be strictly descending; got grid[{i}] = {levels[i]:g}, grid[{i + 1}] = {levels[i + 1]:g}. "
            "Noise levels go from large to small."
        )
    check_interval("grid", levels, 0)
    return levels


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
    return _finish(root**rho, low, high, final)


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
    return _finish(np.exp(np.linspace(np.log(high), np.log(low), num_steps)), low, high, final)


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
    if final is None:
        check_count("num_steps", num_steps, 2)
    else:
        check_count("num_steps", num_steps, 1)
    if not float(t_min) < float(t_max):
        raise ValueError(f"`t_min` must be smaller than `t_max`; got {t_min:g} >= {t_max:g}.")
    times = np.linspace(float(t_max), float(t_min), num_steps)
    # Evaluated now, also inside a trace: a grid is made of numbers.
    with jax.ensure_compile_time_eval():
        levels = np.array([np.asarray(schedule.noise_level(t)).item() for t in times])
    if not np.isfinite(levels).all():
        raise ValueError(
            f"`t_max` must be a time of finite noise level; got levels {levels[:3]}. "
            "Choose `t_max` where the noise level is finite."
        )
    return _append(levels, final)


def angle_uniform(
    num_steps: int,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    sigma_data: float = 1.0,
    final: float | None = 0.0,
) -> Grid:
    r"""Noise levels uniform in the angle $\arctan(\sigma / \sigma_d)$, as equal times of the cosine schedule are.

    The best grid of DDIM on Gaussian data of that deviation: its error is a product of cosines of the angles between
    levels.

    Args:
        num_steps: number of levels from `sigma_max` to `sigma_min`.
        sigma_min: smallest level, positive.
        sigma_max: largest level, above `sigma_min`.
        sigma_data: standard deviation of the data, positive.
        final: level appended at the end, below `sigma_min`; `None` appends none.

    Returns:
        float64 array `(num_steps + 1,)`, or `(num_steps,)` where `final` is `None`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.angle_uniform(3, 0.1, 10.0).round(3).tolist()
        [10.0, 1.0, 0.1, 0.0]

    Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, equation 17.
    """
    low, high = _ends(sigma_min, sigma_max, num_steps, final)
    check_positive("sigma_data", sigma_data)
    scale = float(sigma_data)
    angles = np.linspace(np.arctan(high / scale), np.arctan(low / scale), num_steps)
    return _finish(scale * np.tan(angles), low, high, final)


def beta_quantile(
    num_steps: int,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    a: float = 0.6,
    b: float = 0.6,
    schedule: Schedule | None = None,
    final: float | None = 0.0,
) -> Grid:
    """Noise levels at the quantiles of a beta distribution over time: more of them at both ends than in the middle.

    Args:
        num_steps: number of levels from `sigma_max` to `sigma_min`.
        sigma_min: smallest level, positive.
        sigma_max: largest level, above `sigma_min`.
        a: first shape of the distribution, positive; below 1 levels gather at the small end.
        b: second shape of the distribution, positive; below 1 levels gather at the large end.
        schedule: the schedule whose time is meant; by default the logarithm of the noise level is the time.
        final: level appended at the end, below `sigma_min`; `None` appends none.

    Returns:
        float64 array `(num_steps + 1,)`, or `(num_steps,)` where `final` is `None`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.beta_quantile(3, 0.1, 10.0).round(3).tolist()
        [10.0, 1.0, 0.1, 0.0]

    Source: Lee et al., "Beta Sampling is All You Need: Efficient Image Generation Strategy for Diffusion Models using
    Stepwise Spectral Analysis", 2024, section 4.
    """
    from scipy.stats import beta

    low, high = _ends(sigma_min, sigma_max, num_steps, final)
    check_positive("a", a)
    check_positive("b", b)
    # From the large end to the small one, as grids run.
    share = beta.ppf(np.linspace(1, 0, num_steps), float(a), float(b))
    if schedule is None:
        levels = np.exp(np.log(low) + share * (np.log(high) - np.log(low)))
    else:
        with jax.ensure_compile_time_eval():
            first = float(schedule.time(low))
            last = float(schedule.time(high))
            levels = np.array([float(schedule.noise_level(first + u * (last - first))) for u in share])
    return _finish(levels, low, high, final)


def gaussian_optimal(
    num_steps: int,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    variances: Float[ArrayLike, " d"] | list[float],
    final: float | None = 0.0,
) -> Grid:
    r"""The grid on which DDIM comes closest to Gaussian data, in Kullback-Leibler divergence.

    Along a direction of variance $v$ a step of DDIM multiplies the standard deviation by $\cos\Delta\theta$ too little,
    with $\theta = \arctan(\sigma / \sqrt v)$. So the draws have variance $\rho_v = \prod \cos^2\Delta\theta$ times what
    it should be, and the levels minimize $\tfrac12 \sum_v (\rho_v - 1 - \log\rho_v)$. For one variance this is the grid
    of equal angles, `angle_uniform`.

    Args:
        num_steps: number of levels from `sigma_max` to `sigma_min`.
        sigma_min: smallest level, positive.
        sigma_max: largest level, above `sigma_min`.
        variances: variances of the data along its principal directions `(d,)`, positive.
        final: level appended at the end, below `sigma_min`; `None` appends none.

    Returns:
        float64 array `(num_steps + 1,)`, or `(num_steps,)` where `final` is `None`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.gaussian_optimal(3, 0.1, 10.0, [1.0]).round(3).tolist()
        [10.0, 1.0, 0.1, 0.0]
    """
    # Imported here: scipy's optimizers take long to load.
    from scipy.optimize import minimize

    low, high = _ends(sigma_min, sigma_max, num_steps, final)
    spread = np.asarray(variances, np.float64)
    check(spread.ndim == 1 and spread.size > 0, "variances", "a row of variances", f"shape {spread.shape}")
    check_finite("variances", spread)
    check_interval("variances", spread, 0, open_lo=True)
    if num_steps <= 2:
        return _append(np.array([high, low])[:num_steps], final)
    root = np.sqrt(spread)[:, None]

    def levels_of(free: np.ndarray) -> np.ndarray:
        """Levels whose logarithms divide the range in the proportions `exp(free)`."""
        # Free proportions keep the levels descending, whatever the optimizer tries.
        share = np.exp(free - free.max())
        inner = np.concatenate([[0.0], np.cumsum(share)]) / share.sum()
        return np.exp(np.log(high) + inner * (np.log(low) - np.log(high)))

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        """Logarithm of the divergence and its gradient."""
        # The logarithm, because the divergence itself is tiny and would pass for converged.
        levels = levels_of(free)
        angles = np.arctan(levels / root)
        steps = angles[:, :-1] - angles[:, 1:]
        log_ratio = 2 * np.log(np.cos(steps)).sum(1)
        value = 0.5 * np.sum(np.expm1(log_ratio) - log_ratio)
        by_step = 0.5 * np.expm1(log_ratio)[:, None] * -2 * np.tan(steps)
        by_angle = np.pad(by_step, ((0, 0), (0, 1))) - np.pad(by_step, ((0, 0), (1, 0)))
        by_log = (by_angle * root * levels / (root**2 + levels**2)).sum(0)
        share = np.exp(free - free.max())
        share = share / share.sum()
        later = np.cumsum(by_log[::-1])[::-1][1:] * (np.log(low) - np.log(high))
        by_free = share * (later - np.sum(later * share))
        return float(np.log(value)), by_free / value

    guess = np.arctan(angle_uniform(num_steps, low, high, float(np.exp(np.log(root).mean())), None))
    start = np.log(-np.diff(np.log(np.tan(guess))))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-10})
    return _finish(levels_of(found.x), low, high, final)


def _ends(
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    num_steps: int,
    final: float | None,
) -> tuple[float, float]:
    """Both ends of a grid as numbers, checked together with its length."""
    if final is None:
        check_count("num_steps", num_steps, 2)
    else:
        check_count("num_steps", num_steps, 1)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        check(is_concrete(value), name, "a concrete number, because grids are computed on the host", "a traced value")
        check_finite(name, np.asarray(value, np.float64))
        check_positive(name, value)
    low = np.asarray(sigma_min).item()
    high = np.asarray(sigma_max).item()
    if not low < high:
        raise ValueError(f"`sigma_min` must be smaller than `sigma_max`; got {low:g} >= {high:g}.")
    return low, high


def _finish(levels: Grid, low: float, high: float, final: float | None) -> Grid:
    """A grid with exact ends, which roots and exponentials miss by a rounding error, and its final level."""
    levels[-1] = low
    levels[0] = high
    return _append(levels, final)


def _append(levels: Grid, final: float | None) -> Grid:
    """A grid, checked, with its final level where it has one."""
    if final is not None:
        levels = np.append(levels, float(final))
    return check_grid(levels)
