"""Euler-Maruyama and the reverse-diffusion sampler as tables."""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit.diffusion._samplers._multistep import to_data
from genkit.diffusion._schedules._grids import check_grid
from genkit.sampling import Row, Table


def euler_maruyama(grid: Float[ArrayLike, " levels"]) -> Table:
    r"""Euler-Maruyama on the reverse diffusion, in the noise level as time.

    $$x_t = x_s + 2 (1 - \sigma_t / \sigma_s) (D - x_s) + \sqrt{2 \sigma_s (\sigma_s - \sigma_t)}\; z .$$

    A last step to zero noise, which would overshoot, returns the prediction.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.

    Returns:
        A table of order 1 in distribution, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.euler_maruyama(gkd.karras(10, 0.01, 80.0)).nfe
        10

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 6, with $g^2 = 2\sigma$.
    """

    def variance(s: float, t: float) -> float:
        return 2 * s * (s - t)

    return _score_steps(grid, variance)


def reverse_diffusion(grid: Float[ArrayLike, " levels"]) -> Table:
    r"""The reverse-diffusion sampler: each noising step of the grid is undone as it was made.

    $$x_t = x_s + (1 - \sigma_t^2 / \sigma_s^2) (D - x_s) + \sqrt{\sigma_s^2 - \sigma_t^2}\; z .$$

    A last step to zero noise returns the prediction, without noise.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.

    Returns:
        A table of order 1 in distribution, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.reverse_diffusion(gkd.karras(10, 0.01, 80.0)).nfe
        10

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 46.
    """

    def variance(s: float, t: float) -> float:
        return s**2 - t**2

    return _score_steps(grid, variance)


def _score_steps(grid: Float[ArrayLike, " levels"], variance: Callable[[float, float], float]) -> Table:
    """Steps along the score by a variance, with noise of that variance."""
    rows = []
    for i, (s, t) in enumerate(itertools.pairwise(check_grid(grid))):
        if t == 0:
            # Euler-Maruyama would overshoot the data, and noise would only be seen.
            rows.append(to_data(s, i, i))
            continue
        share = variance(s, t) / s**2
        rows.append(Row(s, s, t, i, a=1 - share, b={i: share}, c=float(np.sqrt(variance(s, t)))))
    return Table.from_rows(rows, order=1)
