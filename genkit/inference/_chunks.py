"""A compiled function over many draws, a part of them at a time."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree


# A chunk of draws may produce this much, so that the device never holds all of a long run at once.
_CHUNK_BYTES = 64 * 2**20


def in_chunks(
    run: Callable[[PyTree, Key[Array, " m"]], PyTree],
    values: PyTree,
    keys: Key[Array, " n"],
    bytes_per_draw: int,
    batch_size: int | None,
) -> PyTree:
    """Run a function over draws chunk by chunk, keeping only NumPy arrays of the chunks that are done.

    Args:
        run: a compiled function of some draws and as many keys.
        values: the draws, each leaf (n, ...).
        keys: one key per draw.
        bytes_per_draw: what the function produces for one draw.
        batch_size: draws per call; None chooses as many as produce 64 MiB.

    Returns:
        The results, each leaf (n, ...).
    """
    count = keys.shape[0]
    if batch_size is None:
        batch_size = max(1, _CHUNK_BYTES // max(bytes_per_draw, 1))
    batch_size = min(batch_size, count)
    parts = []
    for start in range(0, count, batch_size):
        # The last chunk is moved back to full length, so that there is one shape and one compilation.
        first = max(0, min(start, count - batch_size))
        rows = slice(first, first + batch_size)
        part = run(jax.tree.map(lambda x, rows=rows: x[rows], values), keys[rows])
        fresh = start - first
        parts.append(jax.tree.map(lambda x, fresh=fresh: np.asarray(x)[fresh:], jax.device_get(part)))
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *chunks: np.concatenate(chunks), *parts)
