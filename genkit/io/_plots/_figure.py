"""A figure that is written to a file and touches nothing else."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from genkit.storage import atomic_file


@contextlib.contextmanager
def saved_figure(
    path: str | os.PathLike[str], num_panels: int = 1, *, width: float = 6.0, height: float = 2.2
) -> Iterator[list[Any]]:
    """Make a figure of panels below each other, and write it as one PNG when the block ends well.

    Args:
        path: the file to write or to replace.
        num_panels: number of panels.
        width: inches.
        height: inches of one panel.

    Yields:
        The panels, matplotlib `Axes`, from top to bottom.
    """
    # Imported here: matplotlib takes most of a second, and most programs draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * num_panels), layout="constrained")
    # A canvas of its own: pyplot would choose a backend for the whole process.
    FigureCanvasAgg(figure)
    yield list(figure.subplots(num_panels, 1, squeeze=False)[:, 0])
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
