"""Two loops that take turns: rows that need the plain prediction alone have one that holds nothing else."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from genkit.sampling._state import Advance, Batch, Columns, State
from genkit.sampling._steps import before_step


Turn = tuple[Array, State, PyTree]  # number of the next row, state before it, reports so far


def two_phases(batch: Batch, advance: Advance, columns: Columns, state: State) -> tuple[State, PyTree]:
    """Run all rows in two loops that take turns.

    One loop makes the plain prediction and has no branch for any other; it goes on as long as no draw needs one. The
    other takes the rows between. A latch passes from the second to the first once, an interval back and forth. How many
    rows a loop takes is known at run time only, so that there is no reverse-mode derivative.

    Args:
        batch: the draws.
        advance: one row after what acts at its start.
        columns: the table.
        state: before the first row.

    Returns:
        The state after the last row, and what the rows report, stacked.
    """
    runner = batch.runner
    num_rows = len(columns.row)

    def row_at(i: Array) -> Columns:
        return jax.tree.map(lambda leaf: leaf[i], columns)

    # Needs are asked for after what acts at the start of a step, which is why that belongs to the row before.
    def begin(i: Array, state: State) -> State:
        return lax.cond(i < num_rows, lambda s: before_step(batch, s, row_at(i)), lambda s: s, state)

    def phase(plain: bool) -> Callable[[Turn], Turn]:
        pattern = None
        if plain:
            pattern = runner.only_plain

        def goes_on(turn: Turn) -> Array:
            i, state, _ = turn
            row = row_at(i)
            alone = runner.needs_only_plain(batch.context(row, state.y, row.sigma), state.guidance)
            return (i < num_rows) & (alone == plain)

        def body(turn: Turn) -> Turn:
            i, state, seen = turn
            state, output = advance(state, row_at(i), pattern)
            seen = jax.tree.map(lambda column, entry: column.at[i].set(entry), seen, output)
            return i + 1, begin(i + 1, state), seen

        return lambda turn: lax.while_loop(goes_on, body, turn)

    guided = phase(plain=False)
    alone = phase(plain=True)
    zero = jnp.zeros((), jnp.int32)
    state = begin(zero, state)
    _, output = jax.eval_shape(lambda s: advance(s, row_at(zero), None), state)
    seen = jax.tree.map(lambda entry: jnp.zeros((num_rows, *entry.shape), entry.dtype), output)
    _, state, seen = lax.while_loop(
        lambda turn: turn[0] < num_rows, lambda turn: alone(guided(turn)), (zero, state, seen)
    )
    return state, seen
