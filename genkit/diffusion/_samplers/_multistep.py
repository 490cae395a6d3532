r"""Multistep and one-step methods of a chart, as rows of a table.

Each function is one way to choose the predictions that a step combines:

- `multistep`: the predictions of the last `order` steps (Adams-Bashforth, DEIS, DPM-Solver++);
- `predict_and_correct`: the same, and every step is redone once the next prediction is there (UniPC, SA-Solver);
- `stages`: predictions made inside the step itself (DPM-Solver, warm starts).

Weights come from the chart, or from a function that a published variant puts in its place.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from genkit._core._checks import check
from genkit.diffusion._samplers._charts import AbstractChart
from genkit.diffusion._schedules._grids import Grid
from genkit.sampling import Row, Table


Weights = Callable[[Sequence[float], float, float], Sequence[float] | Float[np.ndarray, " k"]]
"""Weights of predictions made at some levels in a step between two levels, as `AbstractChart.weights` gives them."""


def multistep(
    levels: Grid,
    chart: AbstractChart,
    order: int,
    *,
    start: AbstractChart | None = None,
    weights: Weights | None = None,
) -> list[Row]:
    """Rows of the method that extrapolates the last `order` predictions, one evaluation per step.

    Args:
        levels: descending noise levels.
        chart: the chart.
        order: number of predictions that are combined; the first steps combine those there are.
        start: chart of a warm start, in which the first `order - 1` steps are one-step methods of that order (3 at
            most); `None` starts with lower orders.
        weights: weights to take in place of the chart's.

    Returns:
        The rows. A last step to zero noise returns the prediction.
    """
    rows: list[Row] = []
    first_row: list[int] = []  # the row in which each step first evaluates the denoiser
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        first_row.append(len(rows))
        if t == 0:
            rows.append(to_data(s, i, len(rows)))
            continue
        if start is not None and i < order - 1:
            rows += stages(start, s, t, i, min(order, 3), len(rows))
            continue
        steps = [i - j for j in range(min(order, i + 1))]
        found = (weights or chart.weights)([levels[k] for k in steps], s, t)
        past = {first_row[k]: float(w) for k, w in zip(steps, found, strict=True)}
        p, q = chart.prediction(s)
        rows.append(Row(s, s, t, i, p=p, q=q, a=chart.carried(s, t), b=past, c=chart.fresh_noise(s, t)))
    return rows


def predict_and_correct(
    levels: Grid, charts: Sequence[AbstractChart], order: int, *, corrector: bool = True, weights: Weights | None = None
) -> list[Row]:
    """Rows of a predictor whose next evaluation also corrects the step behind it, one evaluation per step.

    Each row first redoes the last step with the prediction just made among those combined, then predicts the next level
    from the corrected state.

    Args:
        levels: descending noise levels.
        charts: chart of each step; all predict the data.
        order: number of predictions that the predictor combines; the corrector adds the newest.
        corrector: redo the steps; without it the rows are those of `multistep`.
        weights: weights to take in place of the charts'.

    Returns:
        The rows. A last step to zero noise returns the prediction.
    """
    rows = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        a = 1.0
        b = {}
        if i > 0:
            before = levels[i - 1]
            steps = [i - 1 - j for j in range(min(order, i))]
            if corrector:
                steps.append(i)
            found = (weights or charts[i - 1].weights)([levels[k] for k in steps], before, s)
            a = charts[i - 1].carried(before, s)
            b = {k: float(w) for k, w in zip(steps, found, strict=True)}
        if t == 0:
            rows.append(Row(s, s, t, i, a=a, b=b, d=0.0, e={i: 1.0}))
            continue
        steps = [i - j for j in range(min(order, i + 1))]
        found = (weights or charts[i].weights)([levels[k] for k in steps], s, t)
        shrink = charts[i].carried(s, t)
        # The base holds the corrected state with the noise of the coming step already in it: the prediction and the
        # correction of that step then see the same noise.
        noise = charts[i].fresh_noise(s, t) / shrink
        e = {k: float(w) for k, w in zip(steps, found, strict=True)}
        rows.append(Row(s, s, t, i, a=a, b=b, c=noise, d=shrink, e=e))
    return rows


def stages(chart: AbstractChart, s: float, t: float, step: int, order: int, first: int) -> list[Row]:
    """Rows of one step of the one-step method of order 1, 2 or 3, from row `first` on.

    Inner predictions are made halfway, or at one and two thirds, of the step on the chart's clock (Heun's nodes).
    """
    fractions = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}[order]
    start = chart.clock(s)
    length = chart.clock(t) - start
    levels = [s, *(chart.level(start + fraction * length) for fraction in fractions[1:])]
    rows = []
    for k, level in enumerate(levels):
        p, q = chart.prediction(level)
        if k + 1 < order:
            target = levels[k + 1]
            found = chart.weights(levels[: k + 1], s, target)
            e = {first + j: float(w) for j, w in enumerate(found)}
            rows.append(Row(level, s, t, step, corrector=k > 0, p=p, q=q, d=chart.carried(s, target), e=e))
            continue
        # The last stage forgets the middle one: two nodes are enough for the order, and history is scarce.
        chosen = list(range(order))
        if order == 3:
            chosen = [0, 2]
        found = chart.weights([levels[j] for j in chosen], s, t)
        b = {first + j: float(w) for j, w in zip(chosen, found, strict=True)}
        rows.append(Row(level, s, t, step, corrector=k > 0, p=p, q=q, a=chart.carried(s, t), b=b))
    return rows


def midpoint(chart: AbstractChart, s: float, t: float, step: int, first: int) -> list[Row]:
    """Rows of one step by the prediction made halfway on the chart's clock alone, from row `first` on."""
    middle = chart.level((chart.clock(s) + chart.clock(t)) / 2)
    p, q = chart.prediction(s)
    e = {first: float(chart.weights([s], s, middle)[0])}
    half = Row(s, s, t, step, p=p, q=q, d=chart.carried(s, middle), e=e)
    p, q = chart.prediction(middle)
    b = {first + 1: float(chart.weights([middle], s, t)[0])}
    return [half, Row(middle, s, t, step, corrector=True, p=p, q=q, a=chart.carried(s, t), b=b)]


def to_data(s: float, step: int, row: int) -> Row:
    """The last step, to zero noise, which returns the prediction."""
    return Row(s, s, 0.0, step, a=0.0, b={row: 1.0})


def table(rows: Sequence[Row], order: int, *, warm: bool) -> Table:
    """A table of a multistep method, whose lower-order start limits the whole to order 2 unless it is warm."""
    if not warm:
        order = min(order, 2)
    return Table.from_rows(rows, order=order)


def check_order(order: int, highest: int) -> None:
    """Refuse anything but an order from 1 to `highest`."""
    if isinstance(order, bool) or order not in range(1, highest + 1):
        names = ", ".join(str(k) for k in range(1, highest))
        check(False, "order", f"{names} or {highest}", order)
