"""Further grids: uniform in an angle, quantiles of a beta law, and the best grid of Gaussian data."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check, check_finite, check_interval, check_positive

from ._grids import Grid, _close, _ends, _pin


def cosine(
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
        >>> gkd.cosine(3, 0.1, 10.0).round(3).tolist()
        [10.0, 1.0, 0.1, 0.0]

    Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, equation 17.
    """
    low, high = _ends(sigma_min, sigma_max, num_steps, final)
    check_positive("sigma_data", sigma_data)
    scale = float(sigma_data)
    angles = np.linspace(np.arctan(high / scale), np.arctan(low / scale), num_steps)
    return _close(_pin(scale * np.tan(angles), high, low), final)


def beta_quantile(
    num_steps: int,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    a: float = 0.6,
    b: float = 0.6,
    schedule: Any = None,
    final: float | None = 0.0,
) -> Grid:
    """Noise levels at the quantiles of a beta law of time: more of them at both ends than in the middle.

    Args:
        num_steps: number of levels from `sigma_max` to `sigma_min`.
        sigma_min: smallest level, positive.
        sigma_max: largest level, above `sigma_min`.
        a: first shape of the law, positive; below 1 levels gather at the small end.
        b: second shape of the law, positive; below 1 levels gather at the large end.
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
    share = beta.ppf(np.linspace(1, 0, num_steps), float(a), float(b))
    if schedule is None:
        levels = np.exp(np.log(low) + share * (np.log(high) - np.log(low)))
    else:
        first, last = float(schedule.time(low)), float(schedule.time(high))
        levels = np.array([float(schedule.noise_level(first + u * (last - first))) for u in share])
    return _close(_pin(levels, high, low), final)


def gaussian_optimal(
    num_steps: int,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    variances: Any,
    final: float | None = 0.0,
) -> Grid:
    r"""The grid on which DDIM comes closest to Gaussian data, in Kullback-Leibler divergence.

    Along a direction of variance $v$ a step of DDIM multiplies the standard deviation by $\cos\Delta\theta$ too little,
    with $\theta = \arctan(\sigma / \sqrt v)$. So the draws have variance $\rho_v = \prod \cos^2\Delta\theta$ times what
    it should be, and the levels minimize $\tfrac12 \sum_v (\rho_v - 1 - \log\rho_v)$. For one variance this is the grid
    of equal angles, `cosine`.

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
    from scipy.optimize import minimize

    low, high = _ends(sigma_min, sigma_max, num_steps, final)
    spread = np.asarray(variances, np.float64)
    check(spread.ndim == 1 and spread.size > 0, "variances", "a row of variances", f"shape {spread.shape}")
    check_finite("variances", spread)
    check_interval("variances", spread, 0, open_lo=True)
    if num_steps <= 2:
        return _close(np.array([high, low])[:num_steps], final)
    root = np.sqrt(spread)[:, None]

    def levels_of(free: np.ndarray) -> np.ndarray:
        """Levels whose logarithms divide the range in the proportions `exp(free)`."""
        share = np.exp(free - free.max())
        inner = np.concatenate([[0.0], np.cumsum(share)]) / share.sum()
        return np.exp(np.log(high) + inner * (np.log(low) - np.log(high)))

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        """The logarithm of the divergence (the divergence itself is tiny) and its gradient."""
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

    guess = np.arctan(cosine(num_steps, low, high, float(np.exp(np.log(root).mean())), None))
    start = np.log(-np.diff(np.log(np.tan(guess))))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-10})
    return _close(_pin(levels_of(found.x), high, low), final)
