"""Values that are known while a program is traced, told from those that are not: asked here, once, for each use.

NumPy functions on a JAX array call the array's own methods, whose results are tracers inside a trace even where the
array itself is known. What is decided on the host is therefore decided on the NumPy arrays of `on_host`.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree


if TYPE_CHECKING:
    # The operators of a union of JAX and NumPy arrays are beyond type checkers.
    Numbers = Any
else:
    Numbers = Array | np.ndarray | np.generic  # of a computation that runs on the host where it can


def is_known(*trees: PyTree) -> bool:
    """True if no leaf of the trees is traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def on_host(value: PyTree) -> np.ndarray | None:
    """`value` as a NumPy array, or `None` where it is traced."""
    if not is_known(value):
        return None
    return np.asarray(value)


def array_module(*values: PyTree) -> ModuleType:
    """NumPy where all values are known, so that tables are made once in float64; `jax.numpy` otherwise."""
    if is_known(*values):
        return np
    return jnp


def float_dtype(*values: PyTree) -> np.dtype:
    """Dtype to compute with: that of the floating inputs, at least float32; integers count as the default float."""
    return np.dtype(jnp.promote_types(jnp.result_type(float, *(_as_typed(v) for v in values)), jnp.float32))


def _as_typed(value: PyTree) -> PyTree:
    if isinstance(value, (bool, int, float)) or hasattr(value, "dtype"):
        return value
    return np.asarray(value)
