"""Heun's method as a table, with churn or restarts."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check, check_count, check_finite, check_interval
from genkit.diffusion._schedules._grids import Grid, check_grid
from genkit.sampling import Row, Table


def heun(grid: Float[ArrayLike, " levels"], churn: Sequence[float] | Float[ArrayLike, " four"] | None = None) -> Table:
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
    if churn is None:
        steps = [(s, t, 0.0) for s, t in itertools.pairwise(levels)]
        return Table.from_rows(_heun_rows(steps), order=2)
    starts, noises = _churned(levels, churn)
    # The first noise comes before the first evaluation: an idle row that only adds it. Later ones end the step before.
    idle = Row(levels[0], starts[0], levels[1], 0, evaluate=False, q=0.0, c=noises[0])
    steps = list(zip(starts, levels[1:], [*noises[1:], 0.0], strict=True))
    return Table.from_rows([idle, *_heun_rows(steps, first=1)], order=2)


def restart(
    grid: Float[ArrayLike, " levels"],
    sigma_lo: float,
    sigma_hi: float,
    num_restarts: int = 1,
    num_steps: int = 4,
    s_noise: float = 1.0,
) -> Table:
    r"""Restart: Heun's method that returns to a higher noise level again and again.

    On reaching `sigma_lo`, noise of standard deviation $\sqrt{\sigma_{hi}^2 - \sigma_{lo}^2}$ lifts the state to
    `sigma_hi`, from where `num_steps` steps (uniform in $\sigma^{1/7}$) lead back down; this `num_restarts` times, then
    on to the end. The noise forgets the errors made so far, the flow makes few new ones.

    Args:
        grid: descending noise levels; `sigma_lo` becomes one of them.
        sigma_lo: where the restarts begin, inside the grid, positive.
        sigma_hi: where they return to, above `sigma_lo`.
        num_restarts: how often.
        num_steps: steps of each way back.
        s_noise: factor of the noise, positive; 1 keeps the distribution.

    Returns:
        A table of order 2 with two evaluations per step, one in a last step to zero noise.

    Raises:
        ValueError: if the grid does not descend or a number is out of its range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.restart(gkd.karras(10, 0.01, 80.0), 0.1, 1.0, num_restarts=2, num_steps=3).nfe
        33

    Source: Xu et al., "Restart Sampling for Improving Generative Processes", NeurIPS 2023, algorithm 1.
    """
    levels = check_grid(grid)
    lo = float(sigma_lo)
    hi = float(sigma_hi)
    check_interval("sigma_lo", lo, max(float(levels[-1]), float(np.nextafter(0, 1))), float(levels[0]))
    if not hi > lo:
        raise ValueError(f"`sigma_hi` must be above `sigma_lo` = {lo:g}; got {hi:g}.")
    check_finite("sigma_hi", np.asarray(hi))
    check_count("num_restarts", num_restarts)
    check_count("num_steps", num_steps)
    check_interval("s_noise", s_noise, 0)
    # A level that differs by rounding alone counts as the same.
    if not (np.isclose(levels, lo, rtol=1e-12, atol=0)).any():
        levels = np.sort(np.append(levels, lo))[::-1]
    back = np.linspace(hi ** (1 / 7), lo ** (1 / 7), num_steps + 1) ** 7
    place = int(np.argmin(np.abs(levels - lo)))
    back[0] = hi
    back[-1] = levels[place]
    lift = float(s_noise) * float(np.sqrt(hi**2 - levels[place] ** 2))
    steps = [(s, t, 0.0) for s, t in itertools.pairwise(levels[: place + 1])]
    if not steps:
        # Restarting from the first level: an idle step in place that only adds the noise.
        steps = [(levels[0], levels[0], 0.0)]
    for _ in range(num_restarts):
        steps[-1] = (*steps[-1][:2], lift)
        steps += [(s, t, 0.0) for s, t in itertools.pairwise(back)]
    steps += [(s, t, 0.0) for s, t in itertools.pairwise(levels[place:])]
    return Table.from_rows(_heun_rows(steps), order=2)


def _heun_rows(steps: Sequence[tuple[float, float, float]], first: int = 0) -> list[Row]:
    """Rows of Heun's method for steps `(from, to, noise added at the end)`, numbered from `first` on."""
    rows: list[Row] = []
    for i, (s, t, noise) in enumerate(steps):
        now = first + len(rows)
        if s == t:
            # A step in place only adds noise.
            rows.append(Row(s, s, t, i, evaluate=False, q=0.0, c=noise))
        elif t == 0:
            # Euler's step alone: the trapezoidal rule would divide by zero noise.
            rows.append(Row(s, s, t, i, a=0.0, b={now: 1.0}, c=noise))
        else:
            rows.append(Row(s, s, t, i, d=t / s, e={now: 1 - t / s}))
            weights = {now: (t - s) / 2 * (1 / t - 2 / s), now + 1: (s - t) / (2 * t)}
            rows.append(Row(t, s, t, i, corrector=True, a=t / s, b=weights, c=noise))
    return rows


def _churned(levels: Grid, churn: Sequence[float] | Float[ArrayLike, " four"]) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels at which the steps start, and the noise added before each of them."""
    numbers = np.asarray(churn, np.float64)
    check(numbers.shape == (4,), "churn", "four numbers (s_churn, s_min, s_max, s_noise)", churn)
    check_interval("churn", numbers, 0)
    strength, low, high, scale = numbers
    check_finite("churn", np.array([strength, low, scale]))
    starts = levels[:-1]
    inside = (starts >= low) & (starts <= high)
    raised = starts * (1 + np.where(inside, min(strength / len(starts), np.sqrt(2) - 1), 0.0))
    return raised, scale * np.sqrt(raised**2 - starts**2)
