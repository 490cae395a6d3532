"""Stochastic samplers as tables: Euler-Maruyama, reverse diffusion, SA-Solver, Restart."""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check, check_count, check_finite, check_interval
from genkit._core._table import Row, Table

from ._coefficients import decay, exponential_weights, fresh_noise, log_snr_clock
from ._grids import check_grid


def euler_maruyama(grid: Float[ArrayLike, " levels"]) -> Table:
    r"""Euler-Maruyama on the reverse diffusion, in the noise level as time.

    $$x_t = x_s + 2 (1 - \sigma_t / \sigma_s) (D - x_s) + \sqrt{2 \sigma_s (\sigma_s - \sigma_t)}\; z .$$

    A last step to zero noise, which would overshoot, returns the prediction.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.

    Returns:
        A table of order 1 in law, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.euler_maruyama(gkd.karras(10, 0.01, 80.0)).nfe
        10

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 6, with $g^2 = 2\sigma$.
    """
    return _score_steps(grid, lambda s, t: 2 * s * (s - t))


def reverse_diffusion(grid: Float[ArrayLike, " levels"]) -> Table:
    r"""The reverse-diffusion sampler: each noising step of the grid is undone as it was made.

    $$x_t = x_s + (1 - \sigma_t^2 / \sigma_s^2) (D - x_s) + \sqrt{\sigma_s^2 - \sigma_t^2}\; z .$$

    A last step to zero noise returns the prediction, without noise.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.

    Returns:
        A table of order 1 in law, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.reverse_diffusion(gkd.karras(10, 0.01, 80.0)).nfe
        10

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 46.
    """
    return _score_steps(grid, lambda s, t: s**2 - t**2)


def _score_steps(grid: Float[ArrayLike, " levels"], variance: Callable[[float, float], float]) -> Table:
    """Steps along the score by a variance, with noise of that variance."""
    rows = []
    for i, (s, t) in enumerate(itertools.pairwise(check_grid(grid))):
        if t == 0:
            rows.append(Row(s, s, t, i, a=0.0, b={i: 1.0}))
            continue
        share = variance(s, t) / s**2
        rows.append(Row(s, s, t, i, a=1 - share, b={i: share}, c=float(np.sqrt(variance(s, t)))))
    return Table.from_rows(rows, order=1)


def sa(
    grid: Float[ArrayLike, " levels"],
    order: int = 3,
    tau: float | Callable[[float], float] = 1.0,
    corrector: bool = True,
) -> Table:
    r"""SA-Solver: stochastic Adams, a multistep method on the reverse diffusion of any stochasticity $\tau$.

    In the clock $\lambda = -\log\sigma$ one step is

    $$x_t = \frac{\sigma_t}{\sigma_s} e^{-\tau^2 h} x_s + \int (1 + \tau^2) e^{-(1 + \tau^2)(\lambda_t - \lambda)}
      \sum_j D_j\, \ell_j(\lambda)\, d\lambda + \sigma_t \sqrt{1 - e^{-2\tau^2 h}}\; z ,$$

    with $\ell_j$ the Lagrange polynomials through the last `order` predictions. The corrector redoes the step with the
    next prediction among them and the same noise, at no extra evaluation. A last step to zero noise is of first order.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: number of predictions that the predictor combines, 1 to 3.
        tau: stochasticity, non-negative: 0 follows the probability flow, 1 the reverse diffusion. A function of the
            noise level at the start of a step makes it depend on the level.
        corrector: correct each step by the next prediction.

    Returns:
        A table, one evaluation per step; of order 2 at most (1 for `order` 1 without corrector), because the first step
        is of lower order.

    Raises:
        ValueError: if the grid does not descend, for an order out of range or a negative stochasticity.

    Example:
        >>> import genkit.diffusion as gkd
        >>> grid = gkd.karras(20, 0.01, 80.0)
        >>> gkd.sa(grid, tau=lambda sigma: float(0.05 < sigma < 1.0)).nfe
        20

    Source: Xue et al., "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", NeurIPS 2023,
    equations 14 to 17.
    """
    levels = check_grid(grid)
    check(order in (1, 2, 3) and not isinstance(order, bool), "order", "1, 2 or 3", order)
    tau2 = [float(tau(s) if callable(tau) else tau) ** 2 for s in levels[:-1]]
    for s in levels[:-1]:
        check_interval("tau", tau(s) if callable(tau) else tau, 0)
    check_finite("tau", np.array(tau2))
    clock = [log_snr_clock(s) for s in levels]
    rows = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        a, b = 1.0, {}
        if i > 0:
            before = levels[i - 1]
            # `base` holds the corrected state with the noise of the coming step already in it: both the prediction and
            # the correction of that step see the same noise.
            reach = min(order, i)
            nodes = [clock[i - 1 - j] for j in range(reach)] + ([clock[i]] if corrector else [])
            weights = exponential_weights(nodes, clock[i - 1], clock[i], tau2[i - 1])
            where = [i - 1 - j for j in range(reach)] + ([i] if corrector else [])
            a = decay(before, s, tau2[i - 1])
            b = {j: float(w) for j, w in zip(where, weights, strict=True)}
        reach = 1 if t == 0 else min(order, i + 1)
        weights = exponential_weights([clock[i - j] for j in range(reach)], clock[i], clock[i + 1], tau2[i])
        shrink = decay(s, t, tau2[i])
        noise = 0.0 if t == 0 else fresh_noise(s, t, tau2[i]) / shrink
        e = {i - j: float(w) for j, w in enumerate(weights)}
        rows.append(Row(s, s, t, i, a=a, b=b, c=noise, d=shrink, e=e))
    return Table.from_rows(rows, order=2 if corrector or order > 1 else 1)


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
        s_noise: factor of the noise, positive; 1 keeps the law.

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
    lo, hi = float(sigma_lo), float(sigma_hi)
    check_interval("sigma_lo", lo, max(levels[-1], np.nextafter(0, 1)), levels[0])
    check(hi > lo, "sigma_hi", f"above `sigma_lo` = {lo:g}", f"{hi:g}")
    check_finite("sigma_hi", np.asarray(hi))
    check_count("num_restarts", num_restarts)
    check_count("num_steps", num_steps)
    check_interval("s_noise", s_noise, 0)
    if not (np.isclose(levels, lo, rtol=1e-12, atol=0)).any():
        levels = np.sort(np.append(levels, lo))[::-1]
    back = np.linspace(hi ** (1 / 7), lo ** (1 / 7), num_steps + 1) ** 7
    place = int(np.argmin(np.abs(levels - lo)))
    back[0], back[-1] = hi, levels[place]
    lift = float(s_noise) * float(np.sqrt(hi**2 - levels[place] ** 2))
    steps = [(s, t, 0.0) for s, t in itertools.pairwise(levels[: place + 1])]
    if not steps:
        # Restarting from the first level: an idle step in place that only adds the noise.
        steps = [(levels[0], levels[0], 0.0)]
    for _ in range(num_restarts):
        steps[-1] = (*steps[-1][:2], lift)
        steps += [(s, t, 0.0) for s, t in itertools.pairwise(back)]
    steps += [(s, t, 0.0) for s, t in itertools.pairwise(levels[place:])]
    return Table.from_rows(heun_rows(steps), order=2)


def heun_rows(steps: list[tuple[float, float, float]]) -> list[Row]:
    """Rows of Heun's method for steps `(from, to, noise added at the end)`."""
    rows: list[Row] = []
    for i, (s, t, noise) in enumerate(steps):
        now = len(rows)
        if s == t:
            rows.append(Row(s, s, t, i, evaluate=False, q=0.0, c=noise))
        elif t == 0:
            rows.append(Row(s, s, t, i, a=0.0, b={now: 1.0}, c=noise))
        else:
            rows.append(Row(s, s, t, i, d=t / s, e={now: 1 - t / s}))
            first, second = (t - s) / 2 * (1 / t - 2 / s), (s - t) / (2 * t)
            rows.append(Row(t, s, t, i, corrector=True, a=t / s, b={now: first, now + 1: second}, c=noise))
    return rows
