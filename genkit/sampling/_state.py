"""State of the drawing loop, columns it scans over, and the batch of draws that it advances."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from genkit.sampling._context import Context
from genkit.sampling._hooks import Hooks
from genkit.sampling._runner import Runner, Tally
from genkit.sampling._table import Table


# Of the key of a draw, 0 is folded in for its start and this for the loop.
LOOP = 1


class State(NamedTuple):
    """What the scan carries; the batch axis comes first, in `history` second."""

    y: Array
    base: Array
    history: Array
    guidance: PyTree
    transforms: tuple[PyTree, ...]
    population: PyTree
    event: PyTree  # x_prev, x0 and reports of the step so far, where there is a population to see them
    tally: Tally


class Columns(NamedTuple):
    """The columns of a table in the dtype of the state, and what follows from them; one row inside the scan."""

    sigma: Array
    sigma_start: Array
    sigma_next: Array
    step: Array
    corrector: Array
    evaluate: Array
    slot: Array
    p: Array
    q: Array
    a: Array
    b: Array
    c: Array
    d: Array
    e: Array
    c_stage: Array
    row: Array
    first: Array  # the first row of its step
    last: Array  # the last row of its step
    sigma_after: Array  # noise level of the state after the row
    d_before: Array  # weight of `base` in the state before the row
    num_steps: Array


def columns_of(table: Table, dtype: jnp.dtype) -> Columns:
    """Columns that the loop scans over, cast to the dtype of the state."""
    floats = {}
    for name in ("sigma", "sigma_start", "sigma_next", "p", "q", "a", "b", "c", "d", "e", "c_stage"):
        floats[name] = jnp.asarray(getattr(table, name), dtype)
    step = jnp.asarray(table.step)
    turn = step[1:] != step[:-1]
    edge = jnp.ones(1, bool)
    return Columns(
        **floats,
        step=step,
        corrector=jnp.asarray(table.corrector),
        evaluate=jnp.asarray(table.evaluate),
        slot=jnp.asarray(table.slot),
        row=jnp.arange(table.num_rows),
        first=jnp.concatenate([edge, turn]),
        last=jnp.concatenate([turn, edge]),
        sigma_after=jnp.concatenate([floats["sigma"][1:], floats["sigma_next"][-1:]]),
        d_before=jnp.concatenate([jnp.ones(1, dtype), floats["d"][:-1]]),
        num_steps=jnp.full(step.shape, step[-1] + 1),
    )


class Batch(eqx.Module):
    """Draws that are advanced together, with everything that does not change from row to row.

    Args:
        runner: the guided denoiser.
        hooks: guidance, transforms, population.
        seeds: data of one key per draw `(n, ...)`, the one its start was drawn from too: as data, because a table under
            `vmap` turns branches into selections, which keys do not survive.
        cond: conditions with leading axis `n`, or `None`.
        impl: the kind of these keys.
    """

    runner: Runner
    hooks: Hooks
    seeds: Array
    cond: PyTree
    impl: Hashable = eqx.field(static=True)

    def context(self, row: Columns, x: Array, sigma: Array) -> Context:
        """Place of the batch: states `x` at noise level `sigma` within the step of `row`."""
        return Context(
            x,
            sigma,
            sigma_start=row.sigma_start,
            sigma_next=row.sigma_next,
            step=row.step,
            num_steps=row.num_steps,
            corrector=row.corrector,
            cond=self.cond,
            key=self.keys(row),
        )

    def keys(self, row: Columns) -> Array:
        """One key per draw for this row."""
        return jax.vmap(lambda key: jax.random.fold_in(key, row.row))(self.loop_keys)

    @property
    def loop_keys(self) -> Array:
        """Keys that `start` leaves for the loop, derived where they are used: most rows draw no noise."""
        keys = jax.random.wrap_key_data(self.seeds, impl=self.impl)
        return jax.vmap(lambda key: jax.random.fold_in(key, LOOP))(keys)


Advance = Callable[[State, Columns, tuple[bool, ...] | None], tuple[State, PyTree]]
"""One row of the table after what acts at its start: new state, and what the row reports."""
