"""Adams-Bashforth methods in the noise, the velocity or the network's own output, as tables."""

from collections.abc import Sequence

from jaxtyping import ArrayLike, Float

from genkit._core._checks import check_choice, check_positive
from genkit.diffusion._samplers._charts import (
    AbstractChart,
    NetworkInAngle,
    NoiseInLevel,
    NoiseInLogLevel,
    VelocityInTime,
)
from genkit.diffusion._samplers._multistep import check_order, multistep, table
from genkit.diffusion._schedules._grids import check_grid
from genkit.sampling import Table


_CLOCKS = {"log_sigma": NoiseInLogLevel, "sigma": NoiseInLevel}

# Weights of the Adams-Bashforth methods on a uniform grid, newest first.
_UNIFORM = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def deis(
    grid: Float[ArrayLike, " levels"], order: int = 3, warm_start: bool = False, clock: str = "log_sigma"
) -> Table:
    r"""DEIS: the predicted noise extrapolated by a polynomial and integrated exactly, one evaluation per step.

    $$x_t = x_s + \int_{\sigma_s}^{\sigma_t} \sum_j \varepsilon_j\, \ell_j(\tau(\sigma))\, d\sigma ,$$

    with $\ell_j$ the Lagrange polynomials through the last `order` predictions in the clock $\tau$. A last step to zero
    noise is of first order.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: number of predictions that are combined, 1 to 4; order 1 is DDIM.
        warm_start: make the first `order - 1` steps one-step methods of full order (at 2 extra evaluations each, 1 for
            order 2), without which the whole is of order 2 at most.
        clock: `"log_sigma"` or `"sigma"`, in which the polynomial is taken.

    Returns:
        A table; `order` is the order that the method keeps from the first step to the last.

    Raises:
        ValueError: if the grid does not descend, for an order out of range or an unknown clock.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.deis(gkd.karras(10, 0.01, 80.0), order=3, warm_start=True).order
        3

    Source: Zhang and Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", ICLR 2023, equation 15;
    the warm start is ours.
    """
    check_choice("clock", clock, _CLOCKS)
    return _adams_bashforth(grid, _CLOCKS[clock](), order, warm_start)


def lms(grid: Float[ArrayLike, " levels"], order: int = 4, warm_start: bool = False) -> Table:
    """The linear multistep method: the predicted noise extrapolated by a polynomial in the noise level.

    The Adams-Bashforth method with the weights of the grid as it is, uniform or not.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: number of predictions that are combined, 1 to 4.
        warm_start: as for `deis`.

    Returns:
        A table, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend or the order is out of range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.lms(gkd.karras(10, 0.01, 80.0)).nfe
        10

    Source: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", section III.5.
    """
    return _adams_bashforth(grid, NoiseInLevel(), order, warm_start)


def ipndm(grid: Float[ArrayLike, " levels"], order: int = 4, uniform: bool = False) -> Table:
    """Improved pseudo linear multistep: Adams-Bashforth on the predicted noise, started by its lower orders.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: number of predictions that are combined, 1 to 4.
        uniform: take the published weights, which are those of a uniform grid whatever the grid is, instead of those of
            the grid; first order only, for comparison.

    Returns:
        A table, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend or the order is out of range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.ipndm(gkd.karras(10, 0.01, 80.0)).order, gkd.ipndm(gkd.karras(10, 0.01, 80.0), uniform=True).order
        (2, 1)

    Source: Zhang and Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", ICLR 2023, appendix H.2
    (published weights); the weights of the grid are ours.
    """
    if not uniform:
        return _adams_bashforth(grid, NoiseInLevel(), order, warm_start=False)
    levels = check_grid(grid)
    check_order(order, 4)
    return Table.from_rows(multistep(levels, NoiseInLevel(), order, weights=_of_uniform_grid), order=1)


def velocity_ab(grid: Float[ArrayLike, " levels"], order: int = 2, warm_start: bool = False) -> Table:
    r"""Adams-Bashforth on the velocity of straight paths, for models trained by flow matching.

    In $x_\tau = (1 - \tau) x_0 + \tau\varepsilon$ with $\tau = \sigma / (1 + \sigma)$ the flow is
    $dx_\tau = (\varepsilon - D)\, d\tau$; where paths are straight the velocity is constant and one step is exact.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: number of predictions that are combined, 1 to 4; order 1 is Euler on the path.
        warm_start: as for `deis`.

    Returns:
        A table, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend or the order is out of range.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.velocity_ab(gkd.karras(10, 0.01, 80.0)).nfe
        10

    Source: Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, section 4.1 (the paths).
    """
    return _adams_bashforth(grid, VelocityInTime(), order, warm_start)


def rosenbrock(
    grid: Float[ArrayLike, " levels"],
    order: int = 3,
    sigma_data: float = 1.0,
    warm_start: bool = False,
) -> Table:
    r"""Rosenbrock-type multistep: the linear part of the flow of Gaussian data is solved exactly.

    With $D = \frac{\sigma_d^2}{\sigma_d^2 + \sigma^2} x + c_{out} F$ the flow is
    $d(x / \sqrt{\sigma_d^2 + \sigma^2}) = -F\, d\theta$ in the angle $\theta = \arctan(\sigma / \sigma_d)$, and $F$ is
    extrapolated by a polynomial in $\theta$. On Gaussian data of that deviation $F = 0$ and every step is exact.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        order: number of predictions that are combined, 1 to 4.
        sigma_data: standard deviation of the data, positive.
        warm_start: as for `deis`.

    Returns:
        A table, one evaluation per step.

    Raises:
        ValueError: if the grid does not descend, for an order out of range or a `sigma_data` that is not positive.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.rosenbrock(gkd.karras(10, 0.01, 80.0), sigma_data=0.5).nfe
        10

    Source: Zheng et al., "DPM-Solver-v3", NeurIPS 2023, section 3.1, with the coefficients of Gaussian data.
    """
    check_positive("sigma_data", sigma_data)
    return _adams_bashforth(grid, NetworkInAngle(float(sigma_data)), order, warm_start)


def _adams_bashforth(grid: Float[ArrayLike, " levels"], chart: AbstractChart, order: int, warm_start: bool) -> Table:
    """The multistep method of a chart."""
    levels = check_grid(grid)
    check_order(order, 4)
    # The one-step start is in the same chart, so that no order is lost at the change.
    start = chart if warm_start else None
    return table(multistep(levels, chart, order, start=start), order, warm=warm_start)


def _of_uniform_grid(levels: Sequence[float], sigma_start: float, sigma_next: float) -> list[float]:
    """Weights of a uniform grid, whatever the grid is."""
    return [weight * (sigma_next - sigma_start) for weight in _UNIFORM[len(levels)]]
