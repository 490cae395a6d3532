"""The linear assignment problem, traceable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from genkit._core._checks import check_finite
from genkit._core._fields import as_number


# State of one search for a shortest path: the column it stands at, the distance of each column, the column before it
# on its path, the columns that are done, and the dual prices of rows and columns.
_Search = tuple[Array, Array, Array, Array, Array, Array]


def assignment(cost: Float[ArrayLike, " n n"]) -> Int[Array, " n"]:
    r"""The permutation that minimizes $\sum_i C_{i \pi(i)}$, exactly, by shortest augmenting paths.

    Args:
        cost: square matrix of finite costs.

    Returns:
        For each row its column `(n,)`.

    Raises:
        ValueError: for a matrix that is not square.

    Source: Crouse, "On Implementing 2D Rectangular Assignment Algorithms", IEEE TAES 2016, section II.
    """
    check_finite("cost", cost)
    cost = as_number(cost)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"`cost` must be a square matrix; got shape {cost.shape}.")
    size = cost.shape[0]
    # Column `size` is a dummy in which the row to be placed waits; rows and columns have dual prices.
    far = jnp.asarray(jnp.inf, cost.dtype)

    def place(i: Array, prices: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row_price, column_price, row_of = prices
        row_of = row_of.at[size].set(i)

        def unfinished(search: _Search) -> Array:
            return row_of[search[0]] >= 0

        def extend(search: _Search) -> _Search:
            column, shortest, before, done, row_price, column_price = search
            done = done.at[column].set(True)
            row = row_of[column]
            reduced = jnp.append(cost[row] - row_price[row], far) - column_price
            closer = (reduced < shortest) & ~done
            shortest = jnp.where(closer, reduced, shortest)
            before = jnp.where(closer, column, before)
            open_paths = jnp.where(done, far, shortest).at[size].set(far)
            step = jnp.min(open_paths)
            # Prices move so that the nearest open column becomes tight.
            moved = jnp.where(done, step, 0)
            row_price = row_price.at[jnp.where(done, row_of, size)].add(moved)
            column_price = column_price - moved
            shortest = jnp.where(done, shortest, shortest - step)
            return jnp.argmin(open_paths), shortest, before, done, row_price, column_price

        start = (
            jnp.asarray(size),
            jnp.full(size + 1, far),
            jnp.full(size + 1, size),
            jnp.zeros(size + 1, bool),
            row_price,
            column_price,
        )
        column, _, before, _, row_price, column_price = jax.lax.while_loop(unfinished, extend, start)

        # The path found is walked back, and every row on it takes the column after it.
        def back(walk: tuple[Array, Array]) -> tuple[Array, Array]:
            column, row_of = walk
            return before[column], row_of.at[column].set(row_of[before[column]])

        _, row_of = jax.lax.while_loop(lambda walk: walk[0] != size, back, (column, row_of))
        return row_price, column_price, row_of

    zero = jnp.zeros(size + 1, cost.dtype)
    _, _, row_of = jax.lax.fori_loop(0, size, place, (zero, zero, jnp.full(size + 1, -1)))
    return jnp.zeros(size, jnp.int32).at[row_of[:size]].set(jnp.arange(size, dtype=jnp.int32))
