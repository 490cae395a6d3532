"""Sums over all pairs of two samples in bounded memory.

The functions of this package are compiled by themselves: people call them outside of any `jit`, where a loop of JAX
would be compiled anew by every call.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from genkit._core._checks import check_finite, fail
from genkit._core._fields import as_number


# Numbers of one block of pairwise differences: 16 MB in float32, which stays in the caches of current processors.
_BLOCK = 2**22
# Up to this width squared distances are added coordinate by coordinate: 8 times faster in the plane on a CPU, where a
# reduction over a short last axis is not vectorized.
_FEW_COORDINATES = 16


def as_samples(**samples: Shaped[ArrayLike, " ..."]) -> tuple[Float[Array, " n d"], ...]:
    """Samples as matrices of equal width and dtype, one flattened example in each row.

    Integers and booleans become floats and half precision becomes float32: sums over pairs need the digits.

    Args:
        **samples: arrays `(n, *shape)` by the names that errors shall use.

    Returns:
        The matrices, in order.

    Raises:
        ValueError: for samples that are empty, complex, or whose examples differ in shape.
        NonFiniteError: for NaN or infinity.
    """
    arrays = {name: as_number(value) for name, value in samples.items()}
    first, *_ = arrays
    for name, array in arrays.items():
        if array.ndim < 1 or array.shape[0] < 1:
            fail(name, "of shape (n, *shape), n at least 1", f"shape {array.shape}")
        if array.shape[1:] != arrays[first].shape[1:]:
            fail(name, f"of examples like those of `{first}`, {arrays[first].shape[1:]}", f"{array.shape[1:]}")
        if jnp.iscomplexobj(array):
            fail(name, "real", array)
        check_finite(name, array)
    dtype = jnp.result_type(jnp.float32, *arrays.values())
    return tuple(array.reshape(array.shape[0], -1).astype(dtype) for array in arrays.values())


def common_scale(*samples: Float[Array, " _ d"]) -> Float[Array, ""]:
    """The power of two next above the largest number, by which samples can be divided without rounding.

    Squares of numbers beyond 1e19 overflow in float32, and those of numbers below 1e-19 vanish.
    """
    top = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in samples]))
    _, exponent = jnp.frexp(jax.lax.stop_gradient(top))
    # The inverse of a power beyond 2^126 would be denormal, which processors may flush to zero.
    return jnp.ldexp(jnp.ones((), top.dtype), jnp.clip(exponent, -120, 120))


def map_rows(function: Callable[..., PyTree], rows: PyTree[Array], numbers_per_row: int) -> PyTree[Array]:
    """`function(row)` for all rows, as many at a time as fill a block at the given size of a row."""
    count = jax.tree.leaves(rows)[0].shape[0]
    size = max(1, min(count, _BLOCK // max(1, numbers_per_row)))
    # Checkpointed, so that a gradient holds one block as well, and not all of them.
    return jax.lax.map(jax.checkpoint(function), rows, batch_size=size)


def map_squares(
    function: Callable[[Float[Array, " m"], Int[Array, ""]], PyTree],
    x: Float[Array, " n d"],
    y: Float[Array, " m d"],
) -> PyTree[Array]:
    """`function(squares, i)` for every row `i` of x, `squares` its squared distances to all rows of y.

    From differences: the expanded square would cancel between near points.
    """
    indices = jnp.arange(x.shape[0])
    dim = x.shape[1]
    if dim > _FEW_COORDINATES:

        def reduce(row: tuple[Float[Array, " d"], Int[Array, ""]]) -> PyTree:
            point, index = row
            return function(jnp.sum((point - y) ** 2, -1), index)

        return map_rows(reduce, (x, indices), y.size)
    columns = [y[:, k] for k in range(dim)]

    def add_up(row: tuple[Float[Array, " d"], Int[Array, ""]]) -> PyTree:
        point, index = row
        total = jnp.zeros(y.shape[0], y.dtype)
        for k, column in enumerate(columns):
            total = total + (point[k] - column) ** 2
        return function(total, index)

    return map_rows(add_up, (x, indices), y.size)


def root(square: Float[Array, " *s"]) -> Float[Array, " *s"]:
    """Square root whose gradient at zero is zero."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def mean_pairs(
    kernel: Callable[[Float[Array, " m"]], Float[Array, " m"]], x: Float[Array, " n d"], y: Float[Array, " m d"]
) -> Float[Array, ""]:
    """Mean over all pairs of `kernel(squared distance)`, a point and itself included."""
    return jnp.mean(map_squares(lambda squares, i: jnp.mean(kernel(squares)), x, y))
