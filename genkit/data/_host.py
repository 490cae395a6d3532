"""Data pipelines of the user's own, run in Python."""

from collections.abc import Callable, Iterable, Iterator

import equinox as eqx
from jaxtyping import PyTree

from genkit._core._checks import fail
from genkit.training import AbstractData


class Host(AbstractData):
    """A data pipeline that runs in Python: files, databases, augmentation with other libraries.

    `gk.fit` draws batches between compiled calls, stacks as many as one call needs, and draws the next ones while the
    device is busy. Several processes must draw the same batches; each keeps its part.

    Args:
        iterator_factory: `iterator_factory(start)` returns an iterator over batches (pytrees of NumPy arrays of equal
            shapes) whose first is batch number `start` (a Python integer, 0 at the beginning). It is what makes
            resuming exact, so batch `i` must be the same whatever `start` is: seed a shuffle by the number of the
            epoch, or noise by `i`.

    Example:
        >>> import numpy as np
        >>> import genkit as gk
        >>> def batches(start):
        ...     for i in range(start, 1000):
        ...         yield np.random.default_rng(i).normal(size=(4, 2))
        >>> first = next(gk.data.Host(batches).batches(7))
        >>> bool((first == next(iter(batches(7)))).all())
        True
    """

    iterator_factory: Callable[[int], Iterable[PyTree]] = eqx.field(static=True)

    def __check_init__(self):
        hint = "Give a function of the first batch's number: a bare iterator cannot be resumed."
        if not callable(self.iterator_factory):
            fail("iterator_factory", "a function", type(self.iterator_factory).__name__, hint)

    def batches(self, start: int) -> Iterator[PyTree]:
        return iter(self.iterator_factory(start))
