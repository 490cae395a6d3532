"""Compiled calls in a row: the state they pass on, the batches they take, and the search for what is not finite."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from genkit.training._feed import bring_back, copy_arrays, feed, local, replicate, snapshot
from genkit.training._host import AbstractData
from genkit.training._step import Plan, TrainState, apart, as_jax, find_fault, run_steps, split, together


_SNAPSHOT_CALLS = 10


class Fault(NamedTuple):
    """The first step that is not finite.

    Args:
        step: number of the step; the state is that before it.
        code: of the kind of fault, for `explain`.
    """

    step: int
    code: int


class Calls:
    """The compiled calls of one training.

    Args:
        plan: everything that training reads.
        state: where it begins.
        data: the recipe's data.
        total: steps in all.
        cut: `cut(step)` yields first step and number of steps of each call from `step` on.
    """

    def __init__(
        self,
        plan: Plan,
        state: TrainState,
        data: AbstractData | Callable[..., PyTree],
        total: int,
        cut: Callable[[int], Iterator[tuple[int, int]]],
    ):
        # NumPy arrays go to the device once, not at every call.
        plan = as_jax(plan)
        mesh = plan.mesh
        if mesh is not None:
            plan = replicate(plan, mesh)
            state = replicate(state, mesh)
        self.plan = plan
        self.data = data
        self.total = total
        self.cut = cut
        self.plan_arrays, self.plan_form = apart(plan)
        changing, self.constants = split(state)
        self.arrays, self.form = apart(changing)
        self.step = int(state.step)
        self.feed = feed(data, plan, cut(self.step), total)
        self.batches = next(self.feed, None)
        self.snapshot = self.arrays
        self.snapshot_step = self.step
        self.calls_since = 0

    def advance(self) -> tuple[dict[str, np.ndarray], bool, Exception | None]:
        """Run one call.

        Returns:
            Its metrics, one entry per step; True if all is finite still; and the error of the data, where the next
            batches could not be drawn.
        """
        if self.calls_since % _SNAPSHOT_CALLS == 0:
            self.snapshot = snapshot(self.arrays)
            self.snapshot_step = self.step
        self.calls_since += 1
        _, count = next(self.cut(self.step))
        # XLA inlines one-iteration loops and may round differently; the remainder path stays bitwise equal.
        rest = np.int32(count)
        if count == self.plan.length >= 2:
            rest = None
        # The call consumes `arrays`: both change in one statement, so that no interrupt falls between them.
        self.arrays, metrics, sound = run_steps(
            self.plan_form, self.form, self.plan_arrays, self.arrays, self.batches, rest
        )
        failure = self._draw(self.step + count)
        metrics, sound = jax.device_get((metrics, sound))
        self.step += count
        return {name: values[:count] for name, values in metrics.items()}, bool(sound), failure

    def _draw(self, step: int) -> Exception | None:
        """Draw the next call's batches while the device is busy; a failure waits until its work is taken note of."""
        self.batches = None
        if step >= self.total:
            return None
        try:
            self.batches = next(self.feed)
        except Exception as error:
            return error
        return None

    def search(self) -> Fault | None:
        """Run again from the last snapshot, looking at each step, and stop before the first that is not finite.

        Returns:
            The fault; None if there is none: only a moment of an optimizer left the finite numbers.
        """
        arrays = bring_back(self.snapshot, self.arrays)
        batches = feed(self.data, self.plan, self.cut(self.snapshot_step), self.total)
        for first, number in self.cut(self.snapshot_step):
            if first >= self.step:
                break
            arrays, reached, code = find_fault(
                self.plan_form, self.form, self.plan_arrays, arrays, next(batches), np.int32(number)
            )
            if int(code):
                self.arrays = arrays
                self.step = int(reached)
                return Fault(self.step, int(code))
        self.arrays = arrays
        return None

    def state(self) -> TrainState:
        """The state so far."""
        arrays = self.arrays
        if self.plan.mesh is not None:
            arrays = local(arrays)
        return eqx.combine(together(arrays, self.form), self.constants)

    def put(self, state: TrainState) -> None:
        """Go on from another state of equal form; its arrays are copied, because others may hold them."""
        arrays, _ = split(state)
        arrays = copy_arrays(arrays)
        if self.plan.mesh is not None:
            arrays = replicate(arrays, self.plan.mesh)
        self.arrays, _ = apart(arrays)
        # A search repeats steps from a snapshot and runs no hooks: the next call takes a new one.
        self.calls_since = 0

    def is_whole(self) -> bool:
        """Return True unless a call that was cut off has consumed the state."""
        if any(x.is_deleted() for x in self.arrays):
            return False
        return int(self.state().step) == self.step
