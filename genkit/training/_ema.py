"""The exponential moving average of trained leaves."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


_HALF = ("float16", "bfloat16")


def ema_start(model: PyTree, mask: PyTree[bool]) -> PyTree:
    """The average before any step: the trained leaves themselves, in single precision where they are in half."""
    return jax.tree.map(_widened, eqx.filter(model, mask))


def _widened(x: Array) -> Array:
    # A half-precision average would round most of its increments away.
    if x.dtype.name in _HALF:
        return x.astype(jnp.float32)
    return x


def ema_step(ema: PyTree, model: PyTree, decay: Array, step: Array) -> PyTree:
    r"""One update, $m \leftarrow m + (1 - d)(x - m)$ with $d = \min(\text{decay}, (1 + s) / (10 + s))$.

    Args:
        ema: the average, `None` where a leaf is not averaged.
        model: the model after the step, `None` where a leaf is not averaged.
        decay: scalar in [0, 1).
        step: scalar, steps done before this one.

    Returns:
        The new average.
    """
    # As an increment, not as d m + (1 - d) x: no digits are lost where the average hardly moves.
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda m, x: m + rate.astype(m.real.dtype) * (x.astype(m.dtype) - m), ema, model)


def ema_model(ema: PyTree | None, model: PyTree) -> PyTree:
    """The model with averaged leaves in place of the trained ones; the model itself where there is no average."""
    if ema is None:
        return model

    def put(average: Array | None, leaf: PyTree) -> PyTree:
        if average is None:
            return leaf
        return average.astype(leaf.dtype)

    return jax.tree.map(put, ema, model, is_leaf=lambda m: m is None)
