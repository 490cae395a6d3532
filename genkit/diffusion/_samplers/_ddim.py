"""DDIM and ancestral sampling as tables."""

import itertools

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check_interval
from genkit.diffusion._schedules._grids import check_grid
from genkit.sampling import Row, Table


def ddim(grid: Float[ArrayLike, " levels"], eta: float = 0.0) -> Table:
    r"""DDIM: Euler on the probability flow, with as much fresh noise as `eta` asks for.

    With $\varsigma = \eta\, \sigma_t \sqrt{1 - \sigma_t^2 / \sigma_s^2}$ one step from $\sigma_s$ to $\sigma_t$ is

    $$x_t = D + \sqrt{\sigma_t^2 - \varsigma^2}\; \frac{x_s - D}{\sigma_s} + \varsigma z.$$

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        eta: stochasticity $\eta$ in [0, 1]: 0 is deterministic, 1 is ancestral sampling.

    Returns:
        A table of order 1, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend or `eta` is out of range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.ddim(gkd.karras(10, 0.01, 80.0), eta=0.5).nfe
        10

    Source: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, equation 12.
    """
    levels = check_grid(grid)
    check_interval("eta", eta, 0, 1)
    rows = [ddim_row(s, t, i, float(eta)) for i, (s, t) in enumerate(itertools.pairwise(levels))]
    return Table.from_rows(rows, order=1)


def ancestral(grid: Float[ArrayLike, " levels"]) -> Table:
    """Ancestral sampling: draw each level from the posterior given the predicted data, as DDPM does.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.

    Returns:
        A table of order 1 in distribution, one evaluation per step; the same as `ddim(grid, eta=1)`.

    Raises:
        ValueError: if the grid does not descend.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.ancestral(gkd.karras(10, 0.01, 80.0)).order
        1

    Source: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, algorithm 2.
    """
    return ddim(grid, eta=1.0)


def ddim_row(s: float, t: float, step: int, eta: float) -> Row:
    """The one row of a step, which is row number `step` of its table."""
    # At eta = 1 this is the standard deviation of the posterior of the next level given state and prediction.
    fresh = eta * t * np.sqrt(1 - (t / s) ** 2)
    kept = np.sqrt(t**2 - fresh**2) / s
    return Row(s, s, t, step, a=kept, b={step: 1 - kept}, c=fresh)
