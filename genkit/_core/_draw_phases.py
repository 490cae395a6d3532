"""The two-phase loop: rows that need the plain prediction alone have a loop that holds nothing else."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._draw_hooks import before_step


if TYPE_CHECKING:
    from ._draw import Columns, Draw, State


def two_phases(draw: "Draw", columns: "Columns", state: "State") -> tuple["State", Any]:
    """Run all rows in two loops that take turns.

    One loop makes the plain prediction and has no branch for any other; it goes on as long as no draw needs one. The
    other takes the rows between. A latch passes from the second to the first once, an interval back and forth. How many
    rows a loop takes is known at run time only, so that there is no reverse-mode derivative.

    Args:
        draw: the drawing loop.
        columns: the table.
        state: before the first row.

    Returns:
        The state after the last row, and what the rows report, stacked.
    """
    runner, num_rows = draw.runner, len(columns.row)

    def row_at(i: Array) -> "Columns":
        return jax.tree.map(lambda leaf: leaf[i], columns)

    # Needs are asked for after what acts at the start of a step, which is why that belongs to the row before.
    def begin(i: Array, state: "State") -> "State":
        return lax.cond(i < num_rows, lambda s: before_step(draw, s, row_at(i)), lambda s: s, state)

    def phase(plain: bool) -> Any:
        pattern = runner.only_plain if plain else None

        def goes_on(loop: Any) -> Array:
            i, state, _ = loop
            row = row_at(i)
            alone = runner.needs_only_plain(draw.context(row, state.y, row.sigma), state.guidance)
            return (i < num_rows) & (alone == plain)

        def body(loop: Any) -> Any:
            i, state, seen = loop
            state, output = draw.begun_row(state, row_at(i), pattern)
            seen = jax.tree.map(lambda column, entry: column.at[i].set(entry), seen, output)
            return i + 1, begin(i + 1, state), seen

        return lambda loop: lax.while_loop(goes_on, body, loop)

    guided, alone = phase(False), phase(True)
    zero = jnp.zeros((), jnp.int32)
    state = begin(zero, state)
    _, output = jax.eval_shape(lambda s: draw.begun_row(s, row_at(zero), None), state)
    seen = jax.tree.map(lambda entry: jnp.zeros((num_rows, *entry.shape), entry.dtype), output)
    _, state, seen = lax.while_loop(
        lambda loop: loop[0] < num_rows, lambda loop: alone(guided(loop)), (zero, state, seen)
    )
    return state, seen
