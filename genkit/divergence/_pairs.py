"""Sums over all pairs of two samples in bounded memory.

The functions of this package are compiled by themselves: people call them outside of any `jit`, where a loop of JAX
would be compiled anew by every call.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from genkit._core._checks import check, check_finite
from genkit._core._fields import as_number


# Numbers of one block of pairwise differences: 16 MB in float32, which stays in the caches of current processors.
_BLOCK = 2**22


def as_samples(**samples: ArrayLike) -> tuple[Float[Array, " n d"], ...]:
    """Samples as matrices of equal width, one flattened example in each row.

    Args:
        **samples: arrays `(n, *shape)` by the names that errors shall use.

    Returns:
        The matrices, in order.

    Raises:
        ValueError: for samples that are empty or whose examples differ in shape.
        NonFiniteError: for NaN or infinity.
    """
    arrays = {name: as_number(value) for name, value in samples.items()}
    first, *_ = arrays
    for name, array in arrays.items():
        check(
            array.ndim >= 1 and array.shape[0] >= 1, name, "of shape (n, *shape), n at least 1", f"shape {array.shape}"
        )
        same = array.shape[1:] == arrays[first].shape[1:]
        check(same, name, f"of examples like those of `{first}`, {arrays[first].shape[1:]}", f"{array.shape[1:]}")
        check_finite(name, array)
    return tuple(array.reshape(array.shape[0], -1) for array in arrays.values())


def map_rows(function: Callable, rows: PyTree[Array], others: Array) -> Array:
    """`function(row)` for all rows, as many at a time as a block of pairs with `others` allows."""
    size = max(1, _BLOCK // max(1, others.size))
    # Checkpointed, so that a gradient holds one block as well, and not all of them.
    return jax.lax.map(jax.checkpoint(function), rows, batch_size=min(size, jax.tree.leaves(rows)[0].shape[0]))


def squares(row: Float[Array, " d"], others: Float[Array, " m d"]) -> Float[Array, " m"]:
    """Squared distances, from differences: the expanded square would cancel between near points."""
    return jnp.sum((row - others) ** 2, axis=-1)


def root(square: Float[Array, " *s"]) -> Float[Array, " *s"]:
    """Square root whose gradient at zero is zero."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


@functools.partial(jax.jit, static_argnums=0)
def mean_pairs(
    kernel: Callable, x: Float[Array, " n d"], y: Float[Array, " m d"], *parameters: Array
) -> Float[Array, ""]:
    """Mean over all pairs of `kernel(squared distance, *parameters)`, a point and itself included."""
    return jnp.mean(map_rows(lambda row: jnp.mean(kernel(squares(row, y), *parameters)), x, y))
