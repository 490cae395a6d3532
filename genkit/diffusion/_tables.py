"""One-step samplers as tables: DDIM, ancestral sampling, Heun with churn."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check, check_finite, check_interval
from genkit._core._table import Row, Table

from ._grids import check_grid


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
    rows = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        fresh = float(eta) * t * np.sqrt(1 - (t / s) ** 2)
        kept = np.sqrt(t**2 - fresh**2) / s
        rows.append(Row(s, s, t, i, a=kept, b={i: 1 - kept}, c=fresh))
    return Table.from_rows(rows, order=1)


def ancestral(grid: Float[ArrayLike, " levels"]) -> Table:
    """Ancestral sampling: draw each level from the posterior given the predicted data, as DDPM does.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.

    Returns:
        A table of order 1 (in law), one evaluation per step; the same as `ddim(grid, eta=1)`.

    Raises:
        ValueError: if the grid does not descend.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.ancestral(gkd.karras(10, 0.01, 80.0)).order
        1

    Source: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, algorithm 2.
    """
    return ddim(grid, eta=1.0)


def heun(grid: Float[ArrayLike, " levels"], churn: Any = None) -> Table:
    r"""Heun's method on the probability flow, optionally with churn: noise added before each step.

    Each step is an Euler step followed by the trapezoidal rule; a step to zero noise is Euler's alone. With churn, a
    step from $\sigma$ inside `[s_min, s_max]` starts from $\hat\sigma = (1 + \gamma) \sigma$ with
    $\gamma = \min(s_{churn} / n, \sqrt 2 - 1)$, after adding noise of standard deviation
    $s_{noise} \sqrt{\hat\sigma^2 - \sigma^2}$.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        churn: `(s_churn, s_min, s_max, s_noise)`, all non-negative; `None` adds no noise.

    Returns:
        A table of order 2 with two evaluations per step, one in a last step to zero noise.

    Raises:
        ValueError: if the grid does not descend or `churn` is not four non-negative numbers.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.heun(gkd.karras(18, 0.002, 80.0), churn=(40.0, 0.05, 50.0, 1.003)).nfe
        35

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    algorithms 1 and 2.
    """
    levels = check_grid(grid)
    starts, noises = _churned(levels, churn)
    rows = []
    if churn is not None:
        # The first noise comes before the first evaluation: an idle row that only adds it.
        rows.append(Row(levels[0], starts[0], levels[1], 0, evaluate=False, q=0.0, c=noises[0]))
    for i, (s, t) in enumerate(zip(starts, levels[1:], strict=True)):
        noise = noises[i + 1] if i + 1 < len(noises) else 0.0
        now = len(rows)
        if t == 0:
            rows.append(Row(s, s, t, i, a=0.0, b={now: 1.0}, c=noise))
            continue
        rows.append(Row(s, s, t, i, d=t / s, e={now: 1 - t / s}))
        first, second = (t - s) / 2 * (1 / t - 2 / s), (s - t) / (2 * t)
        rows.append(Row(t, s, t, i, corrector=True, a=t / s, b={now: first, now + 1: second}, c=noise))
    return Table.from_rows(rows, order=2)


def _churned(levels: Float[np.ndarray, " levels"], churn: Any) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels at which the steps start, and the noise added before each of them."""
    if churn is None:
        return levels[:-1], np.zeros(len(levels) - 1)
    numbers = np.asarray(churn, np.float64)
    check(numbers.shape == (4,), "churn", "four numbers (s_churn, s_min, s_max, s_noise)", churn)
    check_interval("churn", numbers, 0)
    strength, low, high, scale = numbers
    check_finite("churn", np.array([strength, low, scale]))
    starts = levels[:-1]
    inside = (starts >= low) & (starts <= high)
    raised = starts * (1 + np.where(inside, min(strength / len(starts), np.sqrt(2) - 1), 0.0))
    return raised, scale * np.sqrt(raised**2 - starts**2)
