"""DPM-Solver and DPM-Solver++ as tables."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check, check_choice
from genkit.diffusion._samplers._charts import AbstractChart, DataInLogLevel, NoiseInLogLevel
from genkit.diffusion._samplers._multistep import check_order, midpoint, multistep, stages, table, to_data
from genkit.diffusion._schedules._grids import check_grid
from genkit.sampling import Row, Table


def dpmpp(
    grid: Float[ArrayLike, " levels"], order: int = 2, stochastic: bool = False, warm_start: bool = False
) -> Table:
    r"""DPM-Solver++: exponential multistep in the data prediction, one evaluation per step.

    In the clock $\lambda = -\log\sigma$ the linear part of the process is solved exactly and $D$ is extrapolated
    through the last `order` predictions. Without a warm start the coefficients are the published ones (`2M`, `3M` and,
    with `stochastic`, the midpoint form of `SDE-2M`, and `SDE-3M`); the first steps are of lower order, which limits
    the whole to order 2. With `warm_start` the first `order - 1` steps are one-step methods of full order on the
    probability flow, at `order - 1` extra evaluations each, and the coefficients are the integrals of the Lagrange
    polynomials, so that the order is real (2 at most for the stochastic). A last step to zero noise is of first order,
    as it must be.

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
    check_order(order, 3)
    # Warm starts follow the flow also where the rest is stochastic: one-step methods add no noise of their own.
    flow = DataInLogLevel()
    chart = DataInLogLevel(tau2=1.0) if stochastic else flow
    if warm_start:
        rows = multistep(levels, chart, order, start=flow)
        return table(rows, order, warm=not stochastic)
    # SDE-3M is published with the weights of the exact integral at two predictions, all others with the midpoint form.
    midpoint_form = order == 2 or not stochastic

    def published(predicted: Sequence[float], sigma_start: float, sigma_next: float) -> list[float]:
        clock = [chart.clock(level) for level in (*reversed(predicted), sigma_next)]
        return _published(clock, chart.tau2, midpoint_form)

    return table(multistep(levels, chart, order, weights=published), order, warm=False)


def dpm_solver(grid: Float[ArrayLike, " levels"], order: int = 2, prediction: str = "eps") -> Table:
    r"""Single-step DPM-Solver: `order` evaluations in each step and no memory of the steps before.

    In the noise prediction (`"eps"`, DPM-Solver-2 and -3) the inner evaluations are at one half, or at one and two
    thirds, of the step in $\log\sigma$; in the data prediction (`"x0"`, DPM-Solver++(2S)) at one half.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: 2 or 3; 2 only in the data prediction.
        prediction: `"eps"` or `"x0"`.

    Returns:
        A table with `order` evaluations per step, one in a last step to zero noise.

    Raises:
        ValueError: if the grid does not descend, for an order out of range or an unknown prediction.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.dpm_solver(gkd.karras(5, 0.01, 80.0), order=3).nfe
        13

    Source: Lu et al., "DPM-Solver", NeurIPS 2022, algorithms 1 and 2; Lu et al., "DPM-Solver++", 2022, algorithm 1.
    """
    levels = check_grid(grid)
    check_choice("prediction", prediction, ("eps", "x0"))
    if prediction == "eps":
        chart: AbstractChart = NoiseInLogLevel()
        check(order in (2, 3) and not isinstance(order, bool), "order", "2 or 3", order)
    else:
        chart = DataInLogLevel()
        check(order == 2, "order", "2", order)
    rows: list[Row] = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        if t == 0:
            rows.append(to_data(s, i, len(rows)))
        elif order == 3:
            rows += stages(chart, s, t, i, order, len(rows))
        else:
            rows += midpoint(chart, s, t, i, len(rows))
    return Table.from_rows(rows, order=order)


def _published(clock: Sequence[float], tau2: float, midpoint_form: bool) -> list[float]:
    """Weights of the predictions, newest first, as published and as k-diffusion runs them.

    Args:
        clock: minus the log noise levels of the predictions, oldest first, and of the end of the step.
        tau2: squared stochasticity, 0 or 1.
        midpoint_form: at two predictions, approximate the slope's integral by half the step's.

    Returns:
        One weight per prediction.
    """
    h = clock[-1] - clock[-2]
    k = (1 + tau2) * h
    phi1 = -np.expm1(-k)
    if len(clock) == 2:
        return [float(phi1)]
    phi2 = 1 - phi1 / k
    r0 = (clock[-2] - clock[-3]) / h
    if len(clock) == 3:
        slope = phi2 / r0
        if midpoint_form:
            slope = phi1 / 2 / r0
        return [float(phi1 + slope), float(-slope)]
    r1 = (clock[-3] - clock[-4]) / h
    phi3 = phi2 / k - 1 / 2
    # First and second differences of the last three predictions, each as weights (newest, middle, oldest).
    near = np.array([1, -1, 0]) / r0
    far = np.array([0, 1, -1]) / r1
    second = (near - far) / (r0 + r1)
    weights = np.array([phi1, 0, 0]) + phi2 * (near + r0 * second) - phi3 * second
    return weights.tolist()
