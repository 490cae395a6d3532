"""Tables: fixed-grid samplers as data."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY
from typing import NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from genkit._core._checks import check, check_count, check_finite, check_interval, check_shape, fail
from genkit._core._known import is_known


HISTORY = 4
"""Number of past predictions a table may combine; fixed, so that samplers of every order share one compiled program."""


class Row(NamedTuple):
    """One row of a table under construction: one network evaluation and the affine update that follows it.

    `b` and `e` map the number of an earlier row (or of this one) to the weight of the prediction made there.
    """

    sigma: float  # noise level at which the network is evaluated
    sigma_start: float  # noise level at the start of the step this row belongs to
    sigma_next: float  # noise level at the end of that step
    step: int
    corrector: bool = False
    evaluate: bool = True
    p: float = 0.0
    q: float = 1.0
    a: float = 1.0
    b: Mapping[int, float] = {}
    c: float = 0.0
    d: float = 1.0
    e: Mapping[int, float] = {}
    c_stage: float = 0.0


class Table(eqx.Module):
    r"""A fixed-grid sampler as data: one affine recurrence, of which only the numbers distinguish the samplers.

    The drawing loop runs one row after the other, with $z, z'$ standard normal:

    $$D = D(y, \sigma), \quad H_{slot} = p\,y + q\,D, \quad
      base \leftarrow a\,base + \sum_j b_j H_j + c\,z, \quad y \leftarrow d\,base + \sum_j e_j H_j + c'\,z'.$$

    It starts from $base = y = x_{init}$ and returns the last $y$. All columns are array leaves: changing sampler, grid
    or stochasticity at equal row count compiles nothing, tables can be stacked and vmapped over, and differentiated.
    Build one with `genkit.diffusion` or, for a sampler of your own, with `Table.from_rows`.

    Args:
        sigma: noise level of each evaluation, non-negative.
        sigma_start: noise level at the start of the step a row belongs to.
        sigma_next: noise level at the end of the step a row belongs to.
        step: index of that step; the rows of one step are consecutive and share it.
        corrector: whether the row is a later evaluation within its step; guidance then reads its carry but does not
            write it.
        evaluate: whether the network is evaluated; `False` in rows that only rescale, add noise or pad.
        slot: where in the history the row writes its prediction.
        p: weight of the state in what is written to the history.
        q: weight of the prediction in what is written to the history.
        a: weight of `base` in the new `base`.
        b: weights of the history in the new `base`, one per slot.
        c: standard deviation of the noise added to `base`.
        d: weight of `base` in the new state.
        e: weights of the history in the new state, one per slot.
        c_stage: standard deviation of the noise added to the state alone.
        claimed_order: guaranteed order of convergence, read as `order`.

    Example:
        >>> import genkit.diffusion as gkd
        >>> table = gkd.heun(gkd.karras(18, 0.002, 80.0))
        >>> table.order, table.nfe, table.num_steps
        (2, 35, 18)
    """

    _: KW_ONLY
    sigma: Float[ArrayLike, " rows"]
    sigma_start: Float[ArrayLike, " rows"]
    sigma_next: Float[ArrayLike, " rows"]
    step: Int[ArrayLike, " rows"]
    corrector: Bool[ArrayLike, " rows"]
    evaluate: Bool[ArrayLike, " rows"]
    slot: Int[ArrayLike, " rows"]
    p: Float[ArrayLike, " rows"]
    q: Float[ArrayLike, " rows"]
    a: Float[ArrayLike, " rows"]
    b: Float[ArrayLike, " rows 4"]
    c: Float[ArrayLike, " rows"]
    d: Float[ArrayLike, " rows"]
    e: Float[ArrayLike, " rows 4"]
    c_stage: Float[ArrayLike, " rows"]
    claimed_order: Int[ArrayLike, ""]

    def __check_init__(self) -> None:
        """Refuse columns of unequal length, negative or non-finite numbers, and steps out of order."""
        rows = np.shape(self.sigma)
        check(len(rows) == 1 and rows[0] > 0, "sigma", "a column with at least one row", f"shape {rows}")
        for name in ("sigma_start", "sigma_next", "step", "corrector", "evaluate", "slot", "p", "q", "a", "c", "d"):
            check_shape(name, getattr(self, name), rows, "All columns of a table have one entry per row.")
        for name in ("b", "e"):
            check_shape(name, getattr(self, name), (rows[0], HISTORY), "One weight per row and history slot.")
        for name in ("sigma", "sigma_start", "sigma_next", "p", "q", "a", "b", "c", "d", "e", "c_stage"):
            check_finite(name, getattr(self, name))
        for name in ("sigma", "sigma_start", "sigma_next", "c", "c_stage"):
            check_interval(name, getattr(self, name), 0)
        check_interval("slot", self.slot, 0, HISTORY - 1)
        if is_known(self.step):
            jumps = np.diff(np.asarray(self.step), prepend=-1)
            ordered = jumps[0] == 1 and bool(np.isin(jumps, (0, 1)).all())
            check(ordered, "step", "0 in the first row and rise by 0 or 1 from row to row", self.step)

    @classmethod
    def from_rows(cls, rows: Sequence[Row], order: int) -> "Table":
        """Assemble a table, placing each prediction in a history slot that no later row still needs.

        Args:
            rows: the rows, in order; their `b` and `e` refer to rows by number.
            order: guaranteed order of convergence of the method.

        Returns:
            The table, all coefficients float64 numpy arrays.

        Raises:
            ValueError: if some row needs more than four predictions at once.
        """
        last_use = {}
        for i, row in enumerate(rows):
            for j in (*row.b, *row.e):
                if not 0 <= j <= i:
                    fail("rows", "rows that use only predictions made so far", f"row {i} using row {j}")
                last_use[j] = i
        place: dict[int, int] = {}
        slots = []
        for i in range(len(rows)):
            taken = {place[j] for j in place if last_use.get(j, -1) >= i}
            free = [k for k in range(HISTORY) if k not in taken]
            if not free:
                fail("rows", f"a method that keeps at most {HISTORY} predictions", f"more in row {i}")
            place = {j: k for j, k in place.items() if k != free[0]} | {i: free[0]}
            slots.append(dict(place))
        weights = np.zeros((2, len(rows), HISTORY))
        for i, row in enumerate(rows):
            for side, uses in enumerate((row.b, row.e)):
                for j, weight in uses.items():
                    weights[side, i, slots[i][j]] = weight
        dtypes = {"step": np.int32, "corrector": np.bool_, "evaluate": np.bool_}
        columns = {}
        for name, entries in zip(Row._fields, zip(*rows, strict=True), strict=True):
            if name not in ("b", "e"):
                columns[name] = np.array(entries, dtypes.get(name, np.float64))
        slot = np.array([slots[i][i] for i in range(len(rows))], np.int32)
        return cls(**columns, slot=slot, b=weights[0], e=weights[1], claimed_order=np.asarray(order, np.int32))

    @property
    def order(self) -> int:
        """Guaranteed order of convergence in the number of steps (a property that the tests measure)."""
        return int(np.asarray(self.claimed_order))

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser per draw, without guidance."""
        return int(np.sum(self.evaluate))

    @property
    def levels(self) -> Float[np.ndarray, " calls"] | None:
        """The noise levels at which the denoiser is evaluated; `None` where they are traced."""
        if not is_known(self.sigma, self.evaluate):
            return None
        return np.asarray(self.sigma, np.float64)[np.asarray(self.evaluate)]

    @property
    def num_rows(self) -> int:
        """Number of rows; tables of equal row count share one compiled program."""
        return np.shape(self.sigma)[-1]

    @property
    def num_steps(self) -> int:
        """Number of steps, that is of grid intervals."""
        return int(np.asarray(self.step)[-1]) + 1

    def pad(self, num_rows: int) -> "Table":
        """The same sampler with idle rows appended, so that samplers of unequal row count share one program.

        Args:
            num_rows: total number of rows, at least the present number.

        Returns:
            A table that draws the same values with as many evaluations.

        Raises:
            ValueError: if the table has more rows than that.
        """
        check_count("num_rows", num_rows, self.num_rows)
        extra = num_rows - self.num_rows
        if extra == 0:
            return self
        slot = np.zeros(extra, np.int32)
        first = np.eye(HISTORY)[slot]
        end = np.full(extra, np.asarray(self.sigma_next)[-1])
        zero = np.zeros(extra)
        one = np.ones(extra)
        # An idle row writes the state itself into the history and copies it from there: base = y, y = base.
        idle = {"sigma": end, "sigma_start": end, "sigma_next": end, "slot": slot, "p": one, "q": zero}
        idle |= {"a": zero, "b": first, "c": zero, "d": one, "e": 0 * first, "c_stage": zero}
        idle |= {"step": np.full(extra, self.num_steps - 1, np.int32)}
        idle |= {"corrector": np.ones(extra, np.bool_), "evaluate": np.zeros(extra, np.bool_)}
        columns = {name: np.concatenate([np.asarray(getattr(self, name)), tail]) for name, tail in idle.items()}
        return Table(**columns, claimed_order=self.claimed_order)
