"""The seam between the training loop and data pipelines that run in Python."""

import abc
from collections.abc import Iterator

import equinox as eqx
from jaxtyping import PyTree


class AbstractData(eqx.Module):
    """A data pipeline that runs in Python, outside compiled code, and can start at any batch."""

    @abc.abstractmethod
    def batches(self, start: int) -> Iterator[PyTree]:
        """The batches from number `start` on.

        Args:
            start: how many batches come before.

        Returns:
            An iterator over batches, pytrees of arrays of equal shapes.
        """
