"""Costs between two finite sets, seen row by row, so that the matrix of all pairs need not be stored."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from genkit._core._checks import check, check_finite
from genkit._core._known import float_dtype
from genkit.divergence._pairs import map_squares


def _at_least_single(value: ArrayLike) -> Array:
    """Numbers as floats, float32 at least: unsigned integers wrap in differences, half precision ends at 65,504."""
    return jnp.asarray(value, float_dtype(value))


class AbstractCost(eqx.Module):
    """A cost between two finite sets, seen through its rows."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Numbers of sources and of targets."""

    @abc.abstractmethod
    def transpose(self) -> "AbstractCost":
        """The cost from targets to sources."""

    @abc.abstractmethod
    def map_rows(self, function: Callable[[Array, Array], PyTree]) -> PyTree[Array]:
        """`function(row, i)` for every source `i`, where `row` has its costs to all targets.

        Args:
            function: a function of a row and its index.

        Returns:
            The results, stacked.
        """


class MatrixCost(AbstractCost):
    """A cost given as a matrix.

    Args:
        matrix: costs `(n, m)`, finite.

    Example:
        >>> import numpy as np
        >>> import genkit as gk
        >>> gk.divergence.MatrixCost(np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0]])).shape
        (2, 3)
    """

    matrix: Float[Array, " n m"] = eqx.field(converter=_at_least_single)

    def __check_init__(self):
        check(self.matrix.ndim == 2 and self.matrix.size > 0, "cost", "a matrix (n, m)", self.matrix)
        check_finite("cost", self.matrix)

    @property
    def shape(self) -> tuple[int, int]:
        sources, targets = self.matrix.shape
        return sources, targets

    def transpose(self) -> "MatrixCost":
        return MatrixCost(self.matrix.T)

    def map_rows(self, function: Callable[[Array, Array], PyTree]) -> PyTree[Array]:
        # All rows at once: the matrix is in memory anyway.
        return jax.vmap(function)(self.matrix, jnp.arange(self.matrix.shape[0]))


class PointCost(AbstractCost):
    """Half the squared distance between two sets of points, computed block by block and never stored.

    Args:
        x: sources `(n, d)`.
        y: targets `(m, d)`.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> gk.divergence.PointCost(jnp.zeros((2, 3)), jnp.ones((4, 3))).shape
        (2, 4)
    """

    x: Float[Array, " n d"] = eqx.field(converter=_at_least_single)
    y: Float[Array, " m d"] = eqx.field(converter=_at_least_single)

    def __check_init__(self):
        check_finite("x", self.x)
        check_finite("y", self.y)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    def transpose(self) -> "PointCost":
        return PointCost(self.y, self.x)

    def map_rows(self, function: Callable[[Array, Array], PyTree]) -> PyTree[Array]:
        return map_squares(lambda squares, i: function(0.5 * squares, i), self.x, self.y)
