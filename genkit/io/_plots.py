"""Pictures, drawn without touching the user's matplotlib: no pyplot, no global state, no display."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .._core._checks import check, check_count, check_finite
from .._core._files import atomic_file


def plot_grid(
    path: str | os.PathLike[str],
    images: ArrayLike,
    *,
    columns: int | None = None,
    limits: tuple[float, float] = (-1.0, 1.0),
    scale: int | None = None,
) -> None:
    """Save images as one PNG, side by side in rows, each pixel an exact square.

    Args:
        path: the file to write or to replace.
        images: shape `(n, channels, height, width)` with 1 or 3 channels, or `(n, height, width)`.
        columns: images per row; default about the square root of n.
        limits: the values that become black and white; what lies beyond is clipped.
        scale: side of a pixel's square in the file; default makes an image about 64 wide.

    Raises:
        ValueError: if the shape is another one.
        NonFiniteError: if there is NaN or infinity.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.png"
        >>> gk.io.plot_grid(path, np.zeros((4, 1, 8, 8)))
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    from matplotlib import image as writer

    images = np.asarray(images, np.float64)
    images = images[:, None] if images.ndim == 3 else images
    good = images.ndim == 4 and images.shape[1] in (1, 3) and images.size > 0
    check(good, "images", "of shape (n, 1 or 3, height, width) or (n, height, width)", f"shape {images.shape}")
    check_finite("images", images)
    number, _, height, width = images.shape
    columns = int(np.ceil(np.sqrt(number))) if columns is None else columns
    check_count("columns", columns)
    scale = max(1, round(64 / width)) if scale is None else scale
    check_count("scale", scale)
    levels = np.clip((images - limits[0]) / (limits[1] - limits[0]), 0, 1)
    levels = np.kron(levels, np.ones((1, 1, scale, scale)))
    gap, rows = max(1, scale // 2), -(-number // columns)
    tall, wide = height * scale + gap, width * scale + gap
    canvas = np.full((rows * tall + gap, columns * wide + gap, 3), 0.5)
    for i, level in enumerate(levels):
        top, left = gap + i // columns * tall, gap + i % columns * wide
        canvas[top : top + height * scale, left : left + width * scale] = np.broadcast_to(
            np.moveaxis(level, 0, -1), (height * scale, width * scale, 3)
        )
    with atomic_file(path) as file:
        writer.imsave(file, (canvas * 255).round().astype(np.uint8), format="png", origin="upper")


def plot_log(path: str | os.PathLike[str], log: Mapping[str, Float[np.ndarray, " steps"]], *, smooth: int = 0) -> None:
    """Save the curves of a training log as one PNG, a panel per metric.

    Args:
        path: the file to write or to replace.
        log: metrics by name, as `Fitted.log` has them.
        smooth: steps to average over in the heavy line; default a fiftieth of all.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.png"
        >>> gk.io.plot_log(path, {"loss": 1 / np.arange(1.0, 100.0)})
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    check(len(log) > 0, "log", "a dict with at least one metric", "none")
    figure, panels = _figure(len(log))
    for panel, (name, values) in zip(panels, log.items(), strict=True):
        values = np.asarray(values, np.float64)
        width = max(1, min(smooth or len(values) // 50, len(values)))
        panel.plot(values, linewidth=0.6, alpha=0.4, color="tab:blue")
        if width > 1:
            mean = np.convolve(values, np.ones(width) / width, "valid")
            panel.plot(np.arange(len(mean)) + (width - 1) / 2, mean, linewidth=1.4, color="tab:blue")
        panel.set_ylabel(name)
    panels[-1].set_xlabel("step")
    _save(figure, path)


def plot_draws(path: str | os.PathLike[str], values: ArrayLike) -> bool:
    """Save the picture that suits the draws: a grid of images, a scatter of points, a histogram of numbers.

    Args:
        path: the file to write or to replace.
        values: shape `(n, *shape)`.

    Returns:
        Whether there is a picture for draws of this shape.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import genkit as gk
        >>> gk.io.plot_draws(pathlib.Path(tempfile.mkdtemp()) / "draws.png", np.zeros((5, 2)))
        True
    """
    values = np.asarray(values)
    shape = values.shape[1:]
    if len(shape) == 3 and shape[0] in (1, 3):
        plot_grid(path, values)
        return True
    if shape not in ((2,), (1,), ()):
        return False
    figure, (panel,) = _figure(1, height=4.0)
    if shape == (2,):
        panel.scatter(values[:, 0], values[:, 1], s=4, alpha=0.6, linewidths=0)
        panel.set_aspect("equal")
    else:
        panel.hist(values.reshape(-1), bins="auto", density=True)
    _save(figure, path)
    return True


def _figure(panels: int, height: float = 2.2) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, height * panels), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
