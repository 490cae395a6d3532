"""Multistep samplers as tables: DPM-Solver++ and UniPC."""

import itertools

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check
from genkit._core._table import Row, Table

from ._coefficients import decay, exponential_weights, fresh_noise, log_snr_clock
from ._grids import Grid, check_grid


# Clock fractions at which the one-step start of each order evaluates the denoiser.
_START_STAGES = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}


def dpmpp(
    grid: Float[ArrayLike, " levels"], order: int = 2, stochastic: bool = False, warm_start: bool = False
) -> Table:
    r"""DPM-Solver++: exponential multistep in the data prediction, one evaluation per step.

    In the clock $\lambda = -\log\sigma$ the linear part of the process is solved exactly and $D$ is extrapolated
    through the last `order` predictions. Without a warm start the coefficients are the published ones (`2M`, `3M` and,
    with `stochastic`, the midpoint form of `SDE-2M`, and `SDE-3M`); the first steps are of lower order, which limits
    the whole to order 2. With `warm_start` the first `order - 1` steps are one-step methods of full order on the
    probability flow, at `order - 1` extra evaluations each, and the coefficients are the integrals of the Lagrange
    polynomials, so that the order is real (2 at most for the stochastic). A last
    step to zero noise is of first order, as it must be.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: 1, 2 or 3; order 1 is DDIM.
        stochastic: follow the reverse diffusion (fresh noise in every step) rather than the probability flow.
        warm_start: start with one-step methods of full order.

    Returns:
        A table; `order` is the order that the method keeps from the first step to the last.

    Raises:
        ValueError: if the grid does not descend or the order is not 1, 2 or 3.

    Example:
        >>> import genkit.diffusion as gkd
        >>> grid = gkd.karras(20, 0.01, 80.0)
        >>> gkd.dpmpp(grid, order=3).order, gkd.dpmpp(grid, order=3, warm_start=True).order
        (2, 3)

    Source: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022,
    algorithm 2 and section 4; the warm start is ours.
    """
    levels = check_grid(grid)
    _check_order(order)
    tau2 = 1.0 if stochastic else 0.0
    clock = [log_snr_clock(s) for s in levels]
    rows: list[Row] = []
    calls: list[int] = []  # the row in which each step first evaluates the denoiser
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        calls.append(len(rows))
        if warm_start and i < order - 1 and t > 0:
            rows += _one_step(s, t, i, order, len(rows))
            continue
        reach = 1 if t == 0 else min(order, i + 1)
        if warm_start:
            weights = exponential_weights([clock[i - j] for j in range(reach)], clock[i], clock[i + 1], tau2)
        else:
            weights = _published(clock[i - reach + 1 : i + 2], tau2, midpoint=order == 2 or not stochastic)
        past = {calls[i - j]: float(weights[j]) for j in range(reach)}
        rows.append(Row(s, s, t, i, a=decay(s, t, tau2), b=past, c=fresh_noise(s, t, tau2)))
    return Table.from_rows(rows, order=order if warm_start and not stochastic else min(order, 2))


def unipc(grid: Float[ArrayLike, " levels"], order: int = 3) -> Table:
    r"""UniPC: a multistep predictor whose next evaluation also corrects the step behind it, at no extra cost.

    The published coefficients with $B(h) = e^{-h} - 1$ in the data prediction. Each row first corrects the last step
    with the prediction just made, then predicts the next level from the corrected state. A last step to zero noise is
    of first order.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: 1, 2 or 3, the order of the predictor; the corrector raises it by one.

    Returns:
        A table with one evaluation per step. Its guaranteed order is `min(order + 1, 3)`, because the first step is of
        lower order; in practice order 3 shows nearly 4.

    Raises:
        ValueError: if the grid does not descend or the order is not 1, 2 or 3.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.unipc(gkd.karras(10, 0.01, 80.0)).nfe
        10

    Source: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
    NeurIPS 2023, algorithms 5 and 6.
    """
    levels = check_grid(grid)
    _check_order(order)
    clock = [log_snr_clock(s) for s in levels]
    rows = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        a, b = 1.0, {}
        if i > 0:
            reach = min(order, i)
            weights = _unipc_weights([clock[i - 1 - j] for j in range(reach)], clock[i], corrector=True)
            a, b = decay(levels[i - 1], s), {i - 1 - j: float(w) for j, w in enumerate(weights[:-1])}
            b[i] = float(weights[-1])
        reach = 1 if t == 0 else min(order, i + 1)
        weights = _unipc_weights([clock[i - j] for j in range(reach)], clock[i + 1], corrector=False)
        e = {i - j: float(w) for j, w in enumerate(weights)}
        rows.append(Row(s, s, t, i, a=a, b=b, d=decay(s, t), e=e))
    return Table.from_rows(rows, order=min(order + 1, 3))


def _check_order(order: int) -> None:
    check(order in (1, 2, 3) and not isinstance(order, bool), "order", "1, 2 or 3", order)


def _one_step(s: float, t: float, step: int, order: int, first: int) -> list[Row]:
    """Rows of one step of a one-step exponential method of the given order on the probability flow."""
    start, end = log_snr_clock(s), log_snr_clock(t)
    nodes = [start + r * (end - start) for r in _START_STAGES[order]]
    rows = []
    for k in range(order):
        target = nodes[k + 1] if k + 1 < order else end
        weights = exponential_weights(nodes[: k + 1], start, target)
        used = {first + j: float(w) for j, w in enumerate(weights)}
        ratio = float(np.exp(start - target))
        level = s if k == 0 else float(np.exp(-nodes[k]))
        update = {"a": ratio, "b": used} if k + 1 == order else {"d": ratio, "e": used}
        rows.append(Row(level, s, t, step, corrector=k > 0, **update))
    return rows


def _published(clock: Grid | list[float], tau2: float, midpoint: bool) -> list[float]:
    """Weights of the predictions, newest first, as published and as k-diffusion runs them.

    `clock` holds the times of the predictions, oldest first, and of the end of the step.
    """
    if len(clock) == 2:
        return [float(-np.expm1(-(1 + tau2) * (clock[1] - clock[0])))]
    h = clock[-1] - clock[-2]
    k = (1 + tau2) * h
    phi1 = -np.expm1(-k)
    phi2 = 1 - phi1 / k
    r0 = (clock[-2] - clock[-3]) / h
    if len(clock) == 3:
        slope = (phi1 / 2 if midpoint else phi2) / r0
        return [float(phi1 + slope), float(-slope)]
    r1 = (clock[-3] - clock[-4]) / h
    phi3 = phi2 / k - 1 / 2
    # First and second differences of the last three predictions, each as weights (newest, middle, oldest).
    near, far = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
    second = (near - far) / (r0 + r1)
    weights = np.array([phi1, 0, 0]) + phi2 * (near + r0 * second) - phi3 * second
    return weights.tolist()


def _unipc_weights(past: list[float], end: float, corrector: bool) -> list[float]:
    """Weights of the predictions at the clock times `past` (newest first) and, for the corrector, at `end` last."""
    order = len(past)
    if np.isinf(end):
        return [1.0]
    h = end - past[0]
    ratios = np.array([(time - past[0]) / h for time in past[1:]] + [1.0])
    base = np.expm1(-h)  # B(h)
    phi, moments = base / -h - 1, []
    for k in range(1, order + 1):
        moments.append(phi * float(np.prod(np.arange(1.0, k + 1))) / base)
        phi = phi / -h - 1 / float(np.prod(np.arange(1.0, k + 2)))
    used = order if corrector else order - 1
    if used == 0:
        return [float(-base)]
    # With a single difference the published weight is 1/2 whatever the step.
    system = np.vander(ratios[:used], used, increasing=True).T
    rho = np.array([0.5]) if used == 1 else np.linalg.solve(system, np.array(moments[:used]))
    slopes = -base * rho / ratios[:used]
    return [float(-base - slopes.sum()), *slopes.tolist()]
