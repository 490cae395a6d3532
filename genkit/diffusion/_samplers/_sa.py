"""SA-Solver as a table."""

from collections.abc import Callable

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check_finite, check_interval
from genkit.diffusion._samplers._charts import DataInLogLevel
from genkit.diffusion._samplers._multistep import check_order, predict_and_correct
from genkit.diffusion._schedules._grids import check_grid
from genkit.sampling import Table


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
    check_order(order, 3)
    charts = [DataInLogLevel(_stochasticity(tau, s) ** 2) for s in levels[:-1]]
    rows = predict_and_correct(levels, charts, order, corrector=corrector)
    # One step of first order among many of higher order leaves a global error of second order.
    reached = 2
    if order == 1 and not corrector:
        reached = 1
    return Table.from_rows(rows, order=reached)


def _stochasticity(tau: float | Callable[[float], float], sigma: float) -> float:
    """The stochasticity of the step that starts at a noise level."""
    value = tau(sigma) if callable(tau) else tau
    check_interval("tau", value, 0)
    check_finite("tau", np.asarray(value, np.float64))
    return float(value)
