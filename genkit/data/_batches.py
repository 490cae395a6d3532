"""Batches as callable pytrees: `data(key) -> batch`, traceable, the arrays as leaves."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key, PyTree

from genkit._core._checks import check, check_count, check_finite, fail


def _as_arrays(tree: PyTree) -> PyTree[Array]:
    """Every leaf as a JAX array."""
    return jax.tree.map(jnp.asarray, tree)


def _shapes(leaves: Sequence[Array]) -> str:
    return "shapes " + ", ".join(str(np.shape(leaf)) for leaf in leaves)


class Batches(eqx.Module):
    """Random batches of a data set that fits in memory.

    Every call draws `batch_size` indices independently and uniformly, so that a batch depends on its key alone and an
    interrupted training resumes exactly.

    Args:
        arrays: an array `(n, ...)`, or a tree of arrays with one leading axis in common, as `(x, labels)`; finite.
        batch_size: number of examples in a batch, positive.

    Raises:
        ValueError: for no arrays, leading axes that differ, a batch size that is no positive integer.
        NonFiniteError: for data that holds NaN or infinity.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> data = gk.data.Batches((jnp.zeros((10, 3)), jnp.arange(10)), batch_size=4)
        >>> x, labels = data(jax.random.key(0))
        >>> x.shape, labels.shape
        ((4, 3), (4,))
    """

    arrays: PyTree[Array] = eqx.field(converter=_as_arrays)
    batch_size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("batch_size", self.batch_size)
        leaves = jax.tree.leaves(self.arrays)
        check(bool(leaves), "arrays", "at least one array", "an empty tree")
        sizes = {np.shape(leaf)[:1] for leaf in leaves}
        if len(sizes) != 1 or sizes == {()}:
            fail("arrays", "arrays with one leading axis in common", _shapes(leaves))
        if sizes == {(0,)}:
            fail("arrays", "at least one example", _shapes(leaves))
        check_finite("arrays", self.arrays, "Drop or impute the examples concerned.")

    @property
    def num_examples(self) -> int:
        """Number of examples in the data set."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    def __call__(self, key: Key[Array, ""]) -> PyTree[Array]:
        """Draw a batch: a tree like `arrays` with `batch_size` rows."""
        rows = jr.randint(key, (self.batch_size,), 0, self.num_examples)
        return jax.tree.map(lambda array: array[rows], self.arrays)


class Generated(eqx.Module):
    """Batches of a distribution that can be drawn: every batch is new.

    Args:
        draw: function `(num_samples, *, key) -> batch`, as `two_moons` and its neighbors; traceable.
        batch_size: number of examples in a batch, positive.

    Raises:
        ValueError: for a `draw` that is not callable or a batch size that is no positive integer.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> data = gk.data.Generated(gk.data.two_moons, batch_size=4)
        >>> data(jax.random.key(0)).shape
        (4, 2)
    """

    draw: Callable[..., PyTree]
    batch_size: int = eqx.field(static=True)

    def __check_init__(self):
        check(callable(self.draw), "draw", "a function `(num_samples, *, key) -> batch`", self.draw)
        check_count("batch_size", self.batch_size)

    def __call__(self, key: Key[Array, ""]) -> PyTree[Array]:
        """Draw a batch."""
        return self.draw(self.batch_size, key=key)
