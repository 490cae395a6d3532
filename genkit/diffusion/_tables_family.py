"""Multistep and one-step methods in the noise, the velocity or the network's own output, as tables."""

import itertools

import numpy as np
from jaxtyping import ArrayLike, Float

from genkit._core._checks import check, check_choice, check_positive
from genkit._core._table import Row, Table

from ._coefficients import decay
from ._families import Angle, Family, NoiseInLog, NoiseInSigma, Velocity
from ._grids import check_grid


_CLOCKS = {"log_sigma": NoiseInLog, "sigma": NoiseInSigma}

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
    return _multistep(grid, _CLOCKS[clock](), order, warm_start)


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
    return _multistep(grid, NoiseInSigma(), order, warm_start)


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
        return _multistep(grid, NoiseInSigma(), order, warm_start=False)
    levels = check_grid(grid)
    _check_order(order)
    rows = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        if t == 0:
            rows.append(_to_data(s, i, len(rows)))
            continue
        p, q = NoiseInSigma().push(s)
        weights = _UNIFORM[min(order, i + 1)]
        rows.append(Row(s, s, t, i, p=p, q=q, b={i - j: w * (t - s) for j, w in enumerate(weights)}))
    return Table.from_rows(rows, order=1)


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
    return _multistep(grid, Velocity(), order, warm_start)


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
        ValueError: if the grid does not descend, for an order out of range or a deviation that is not positive.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.rosenbrock(gkd.karras(10, 0.01, 80.0), sigma_data=0.5).nfe
        10

    Source: Zheng et al., "DPM-Solver-v3", NeurIPS 2023, section 3.1, with the coefficients of Gaussian data.
    """
    check_positive("sigma_data", sigma_data)
    return _multistep(grid, Angle(float(sigma_data)), order, warm_start)


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
    allowed = (2, 3) if prediction == "eps" else (2,)
    check(order in allowed and not isinstance(order, bool), "order", " or ".join(map(str, allowed)), order)
    rows: list[Row] = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        if t == 0:
            rows.append(_to_data(s, i, len(rows)))
        elif order == 3:
            rows += one_step(NoiseInLog(), s, t, i, order, len(rows))
        else:
            rows += _midpoint(s, t, i, len(rows), in_noise=prediction == "eps")
    return Table.from_rows(rows, order=order)


def _midpoint(s: float, t: float, step: int, first: int, in_noise: bool) -> list[Row]:
    """Rows of one step by the prediction made halfway in the logarithm of the noise level, from row `first` on."""
    middle = float(np.sqrt(s * t))
    if in_noise:
        (p, q), (p_half, q_half) = NoiseInLog().push(s), NoiseInLog().push(middle)
        half = Row(s, s, t, step, p=p, q=q, e={first: middle - s})
        return [half, Row(middle, s, t, step, corrector=True, p=p_half, q=q_half, b={first + 1: t - s})]
    half = Row(s, s, t, step, d=decay(s, middle), e={first: 1 - middle / s})
    return [half, Row(middle, s, t, step, corrector=True, a=decay(s, t), b={first + 1: 1 - t / s})]


def one_step(family: Family, s: float, t: float, step: int, order: int, first: int) -> list[Row]:
    """Rows of one step of the one-step method of order 2 or 3 (Heun's third-order nodes), from row `first` on."""
    start, end = family.clock(s), family.clock(t)
    inner = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}[order]
    nodes = [start, *(start + r * (end - start) for r in inner)]
    levels = [s, *(family.level(node) for node in nodes[1:])]
    rows = []
    for k, level in enumerate(levels):
        p, q = family.push(level)
        last = k + 1 == order
        target, reached = (end, t) if last else (nodes[k + 1], levels[k + 1])
        # The last stage forgets the middle one: two nodes are enough for the order, and room in the history is scarce.
        chosen = [0, 2] if last and order == 3 else list(range(k + 1))
        weights = family.weights([nodes[j] for j in chosen], start, target) * family.scale(reached)
        used = {first + j: float(w) for j, w in zip(chosen, weights, strict=True)}
        ratio = family.scale(reached) / family.scale(s)
        update = {"a": ratio, "b": used} if last else {"d": ratio, "e": used}
        rows.append(Row(level, s, t, step, corrector=k > 0, p=p, q=q, **update))
    return rows


def _multistep(grid: Float[ArrayLike, " levels"], family: Family, order: int, warm_start: bool) -> Table:
    """The multistep method of a family."""
    levels = check_grid(grid)
    _check_order(order)
    clock = [family.clock(s) for s in levels if s > 0]
    rows: list[Row] = []
    calls: list[int] = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        calls.append(len(rows))
        if t == 0:
            rows.append(_to_data(s, i, len(rows)))
            continue
        if warm_start and i < order - 1:
            rows += one_step(family, s, t, i, min(order, 3), len(rows))
            continue
        reach = min(order, i + 1)
        weights = family.weights([clock[i - j] for j in range(reach)], clock[i], clock[i + 1]) * family.scale(t)
        p, q = family.push(s)
        past = {calls[i - j]: float(w) for j, w in enumerate(weights)}
        rows.append(Row(s, s, t, i, p=p, q=q, a=family.scale(t) / family.scale(s), b=past))
    return Table.from_rows(rows, order=order if warm_start else min(order, 2))


def _to_data(s: float, step: int, row: int) -> Row:
    """The last step, to zero noise, which returns the prediction."""
    return Row(s, s, 0.0, step, a=0.0, b={row: 1.0})


def _check_order(order: int) -> None:
    check(order in (1, 2, 3, 4) and not isinstance(order, bool), "order", "1, 2, 3 or 4", order)
